"""Blocks of a model whose weights are shared out among the ranks, each whole only while it runs.

The work is that of FSDP2, `torch.distributed.fsdp.fully_shard`, with two differences.  A block is not wrapped
itself: its call goes through a carrier, so that it can be an ordinary module again while experts are added.
And ranks need not pass the blocks in the same order, nor as often: whoever comes to a block asks for it, see
`mingle.ranks.ask`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.nn.linear import MingleLinear

if TYPE_CHECKING:  # a second of imports, for those who share weights out
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

#: the tensors of a `MingleLinear` that every rank has whole
_GATES = ("gate_weight", "gate_bias", "frozen_gate_weight", "frozen_gate_bias")


class _Carrier(nn.Module):
    """Calls a block by its class's `forward`; FSDP2's hooks are on this module instead of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


class _Gathering:
    """Gathers a block's weights in the turn that all ranks know of; stands in for FSDP2's own collective.

    Attributes:
        number: of the offer.
        together: whether all ranks have come for this very block, so that nobody has to ask.
    """

    def __init__(self) -> None:
        self.number, self.together = 0, False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: object, async_op: bool = False
    ) -> None:
        def gather() -> None:
            ranks.all_gather(output_tensor, input_tensor)

        if self.together:
            gather()
        else:
            ranks.ask(self.number, gather)


class ShardedBlocks:
    """The blocks of a model, the weights of each shared out among all ranks, or whole in a process alone.

    What is shared out are their parameters, experts too.  Every rank has gates, buffers, tensors of no or one
    number, and parameters that are also those of another module.

    All ranks make the same calls at the same places, but for passes of the model.

    Args:
        model: which holds the blocks.
        names: their dotted names in it.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.blocks = {name: model.get_submodule(name) for name in names}
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        # by place, as parameters are replaced
        self._common = {
            (module, key)
            for module in model.modules()
            for key, parameter in module.named_parameters(recurse=False)
            if owners[id(parameter)] > 1
        }
        self._carriers: dict[str, tuple[FSDPModule, _Gathering]] = {}
        self._mesh: DeviceMesh | None = None

    def share(self, name: str) -> None:
        """Share out the weights of a block, which has them whole."""
        if ranks.size() == 1:
            return
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        block, whole = self.blocks[name], set[nn.Parameter]()
        device = next(block.parameters()).device
        if self._mesh is None:
            self._mesh = DeviceMesh(device.type, torch.arange(ranks.size()))
        for module in block.modules():
            if isinstance(module, MingleLinear) and module.prepack:
                raise ValueError(f"{name}: layers that keep their weights packed cannot be shared out")
            for key, parameter in module.named_parameters(recurse=False):
                gate = isinstance(module, MingleLinear) and key in _GATES
                if gate or (module, key) in self._common or not parameter.dim() or parameter.numel() < 2:
                    whole.add(parameter)
                elif not parameter.is_contiguous():  # as of a Conv1D, which FSDP2 does not take
                    dense = nn.Parameter(parameter.detach().contiguous(), parameter.requires_grad)
                    setattr(module, key, dense)
        carrier: Any = _Carrier(block)
        carrier.train(block.training)
        fully_shard(
            carrier,
            mesh=self._mesh,
            reshard_after_forward=True,
            shard_placement_fn=_placement,
            ignored_params=whole,
        )
        gathering = _Gathering()
        carrier.set_custom_all_gather(gathering)
        gathering.number = ranks.offer(lambda: self._join(name))
        self._carriers[name] = carrier, gathering
        block.forward = _resharding(carrier)

    @contextmanager
    def changed(self, name: str) -> Iterator[None]:
        """Inside, a block is an ordinary module with whole weights, whose parameters may be replaced."""
        if name in self._carriers:
            ranks.gather(None)  # nobody needs this carrier any more
            block, (carrier, gathering) = self.blocks[name], self._carriers.pop(name)
            parts = [
                (module, key)
                for module in block.modules()
                for key, parameter in module.named_parameters(recurse=False)
                if _is_shared_out(parameter)
            ]
            gathering.together = True
            carrier.unshard()
            whole = [_own(getattr(module, key)) for module, key in parts]
            carrier.reshard()
            for (module, key), parameter in zip(parts, whole, strict=True):
                setattr(module, key, parameter)
            ranks.withdraw(gathering.number)
            del block.forward  # the class has it
        yield
        self.share(name)

    def close(self) -> None:
        """Make the blocks ordinary modules, of shares of weights, that no rank can run any more."""
        if self._carriers:
            ranks.gather(None)
        for name, (_, gathering) in self._carriers.items():
            ranks.withdraw(gathering.number)
            del self.blocks[name].forward
        self._carriers = {}

    def _join(self, name: str) -> None:
        """Give this rank's part of a block to whoever asks for it."""
        carrier, gathering = self._carriers[name]
        gathering.together = True
        try:
            carrier.unshard()
            carrier.reshard()
        finally:
            gathering.together = False


def _resharding(carrier: Any) -> Any:
    """The call of a carrier, which has no whole weights afterwards, whatever is raised."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return carrier(*args, **kwargs)
        except BaseException:
            getattr(carrier, "reset_iter_state", carrier.reshard)()  # not in every version of PyTorch
            raise

    return call


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """The same in memory of its own."""
    return nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _placement(parameter: nn.Parameter) -> Shard | None:
    """The dimension to divide: the first of which all ranks have equal parts, and else the first of all."""
    from torch.distributed.tensor import Shard

    for dim, size in enumerate(parameter.shape):
        if size % ranks.size() == 0:
            return Shard(dim)
    return None


def _is_shared_out(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank has only a share of a tensor; where their class is not loaded, there are none."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank has only a share of some weights."""
    return any(map(_is_shared_out, model.parameters()))


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that is shared out, and any other tensor as it is."""
    return tensor.to_local() if _is_shared_out(tensor) else tensor


def entries(stacks: Mapping[Any, Tensor], place: int) -> dict[Any, Tensor]:
    """The entries at one place of stacks [T, ...], whole on every rank; all call it with the same names."""
    own, dims = {}, {}
    for name, stack in stacks.items():
        part = own_part(stack.detach())
        if _is_shared_out(stack):
            placement: Shard = stack.placements[0]  # type: ignore[assignment]
            dims[name] = placement.dim
            own[name] = part.cpu() if placement.dim == 0 else part[place].cpu()
        else:
            own[name] = part[place]
    if not dims:
        return own
    found = ranks.gather({name: own[name] for name in dims})
    for name, dim in dims.items():
        parts = [each[name] for each in found]
        whole = torch.cat(parts)[place] if dim == 0 else torch.cat(parts, dim - 1)
        own[name] = whole.to(stacks[name].device)
    return own
