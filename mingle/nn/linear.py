"""`MingleLinear`: a frozen linear layer that takes on gated low-rank experts, one task after another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from mingle import functional
from mingle.kernels import prepack as prepacked
from mingle.kernels.dtypes import wide
from mingle.kernels.gated_experts import reference
from mingle.kernels.gated_experts.reference import REDUCTIONS
from mingle.nn.conv1d import conv1d, is_conv1d
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.prepared import PREPARED, PreparedLayer, prepare
from mingle.ops.operands import LayerTensors
from mingle.ops.side_by_side import lay, movable, together

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

GATE_INIT_STD = 0.01


class Siblings(Protocol):
    """Layers that are called with the same input, computed at the first of their calls."""

    def forward(self, position: int, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The output of the layer at `position` among them, or None where it is to be computed alone."""


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class MingleLinear(nn.Module):
    """Drop-in for `torch.nn.Linear`: y = x W₀ᵀ + b + Σ_i g_i(x) · (x A_iᵀ) B_iᵀ (MINGLE Eq. 2).

    It also takes the place of GPT-2's `Conv1D`, whose weight is W₀ᵀ.

    With no experts it is bitwise the layer it was made from.  Only the gates of the newest expert train;
    base, experts and older gates are frozen parameters, and all of them are part of the `state_dict`.
    Experts of lower rank are padded with zeros to the highest one.

    Attributes:
        weight, bias: W₀ [d_out, d_in] and b [d_out] or None, shared with the original layer.
        transposed: whether the original layer is a `Conv1D`; `weight` is then a transposed view, and
            [d_in, d_out] in state dicts, as in that layer's own.
        A, B: [T, r, d_in] and [T, d_out, r].
        gate_weight, gate_bias: the trainable gates, [n, d_in] and [n], in fp32 or better; n is 1 after
            `add_expert`.
        frozen_gate_weight, frozen_gate_bias: the other gates, [T − n, d_in] and [T − n]; they come first.
        reduce: what the gates see, ``"token"``, ``"sample"`` or ``"batch"``; see
            `mingle.functional.gated_experts`.
        backend: passed on to `mingle.functional.gated_experts`.
        prepack: keep the frozen weights a second time, in the layout that CPU products are fastest in (see
            `mingle.kernels.prepack`).  Made anew after every change, never saved; results differ by rounding.
        shared: set by `mingle.share_inputs`: this layer's siblings, and its place among them.
        token_mask: bool [n, N], true for tokens that count in the gates' means, where `forward` is not given
            one; set around a call by whoever knows the padding, and not part of the state.  See `counted`.
        given_gates: gates of a router, which replace the layer's own; set around a call, and not part of the
            state.  They are as `mingle.functional.gated_experts` takes them, or one row for each n samples
            of an x with k · n rows, where every k rows in a row are one sample's: the windows of an image,
            or an encoder's output repeated for beams.
        gate_prior: factors of the layer's own gates, [n, T] as a router gives them; set and read as
            `given_gates` are.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    A: nn.Parameter
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    frozen_gate_weight: nn.Parameter
    frozen_gate_bias: nn.Parameter
    _prepared: PreparedLayer | None = None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        reduce: str = "sample",
        backend: str = "auto",
        prepack: bool = False,
    ) -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce={reduce!r}: expected one of {', '.join(REDUCTIONS)}")
        self.reduce = reduce
        self.backend = backend
        self.prepack = prepack
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self.A = _frozen(weight.new_empty(0, 0, self.in_features))
        self._laid: dict[str, torch.Tensor] = {}  # see `_join_gates`
        # Stored transposed, so that all experts lie side by side for one product; `B` is a view.
        self.B_transposed = _frozen(weight.new_empty(0, 0, self.out_features))
        gate_dtype = wide(weight)  # steps of Adam are lost in half precision
        self._set_gates(
            weight.new_empty(0, self.in_features, dtype=gate_dtype),
            weight.new_empty(0, dtype=gate_dtype),
            trainable=0,
        )
        self.transposed = False
        self._kind: type[nn.Module] = nn.Linear
        self._base_trainable = False
        self.shared: tuple[Siblings, int] | None = None
        self.token_mask: torch.Tensor | None = None
        self.given_gates: torch.Tensor | None = None
        self.gate_prior: torch.Tensor | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | Conv1D,
        reduce: str = "sample",
        *,
        backend: str = "auto",
        prepack: bool = False,
    ) -> MingleLinear:
        """Wrap `linear` without copying its weight.  The original layer is left as it is."""
        transposed = is_conv1d(linear)
        weight = linear.weight.mT if transposed else linear.weight
        layer = cls(weight, linear.bias, reduce=reduce, backend=backend, prepack=prepack)
        layer.transposed, layer._kind = transposed, type(linear)
        layer._base_trainable = linear.weight.requires_grad
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear | Conv1D:
        """The base layer again, of its own kind, without experts, sharing W₀ and b."""

        def shared(tensor: torch.Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.detach(), requires_grad=self._base_trainable)

        if self.transposed:
            assert self.bias is not None  # a Conv1D has one
            return conv1d(shared(self.weight.mT), shared(self.bias)).train(self.training)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = shared(self.weight)
        if self.bias is not None:
            linear.bias = shared(self.bias)
        if issubclass(self._kind, nn.Linear):
            linear.__class__ = self._kind  # it adds nothing but its `forward`, see `computes_linear`
        return linear.train(self.training)

    @property
    def num_experts(self) -> int:
        return len(self.A)

    @property
    def frozen_gates(self) -> int:
        """How many gates are frozen; they are the oldest."""
        return self.frozen_gate_weight.shape[0]

    @property
    def rank(self) -> int:
        """The highest rank among the experts; 0 without any."""
        return self.A.shape[1]

    @property
    def B(self) -> torch.Tensor:
        """Up-projections [T, d_out, r], a view."""
        return self.B_transposed.mT

    def experts(self) -> list[LowRankExpert]:
        return [LowRankExpert(a, b) for a, b in zip(self.A, self.B, strict=True)]

    def all_gates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, d_in] and biases [T] of all gates, oldest first; the trainable ones get gradients."""
        frozen, weight, bias = self.frozen_gate_weight, self.gate_weight, self.gate_bias
        if frozen.shape[0] == 0:
            return weight, bias
        return torch.cat((frozen, weight)), torch.cat((self.frozen_gate_bias, bias))

    def gates(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The gates that the experts have in `forward` of the same arguments.

        Returns:
            [..., N or 1, T], in fp32 or better; given ones as they were given.
        """
        if self.given_gates is not None:
            return _repeated(self.given_gates, x)
        mask = self.counted(x) if mask is None else mask
        with torch.autocast(x.device.type, enabled=False):
            gates = reference.gate_values(x, *self.all_gates(), self.reduce, mask)
        if self.gate_prior is None:
            return gates
        prior = _repeated(self.gate_prior, x).to(gates)
        if prior.dim() == 2:
            prior = prior.view(len(prior), *[1] * (gates.dim() - 2), prior.shape[1])
        return gates * prior

    def counted(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of x [..., d_in] the `token_mask` counts, [...], or None without one.

        Some models pass on the tokens of all samples in one dimension, such as those of a shared expert, and
        some fill samples up to whole windows: what they add on the right does not count.  Some read what is
        in a key-value cache once more; gates of single tokens need no mask for that.
        """
        mask, shape = self.token_mask, x.shape[:-1]
        if mask is None or mask.shape == shape:
            return mask
        if mask.numel() == math.prod(shape):
            return mask.reshape(shape)
        if x.dim() == 3 and mask.dim() == 2 and len(mask) == len(x) and mask.shape[1] < shape[1]:
            return torch.nn.functional.pad(mask, (0, shape[1] - mask.shape[1]))
        return None if self.reduce == "token" else mask

    def add_expert(
        self,
        A: torch.Tensor,
        B: torch.Tensor,
        *,
        gate_weight: torch.Tensor | None = None,
        gate_bias: float | torch.Tensor = 0.0,
    ) -> None:
        """Append an expert, freeze all older gates and make its gate the trainable one.

        Args:
            A: [r, d_in], any strides; copied to the layer's dtype and device, as all of these.
            B: [d_out, r], any strides.
            gate_weight: the new gate's initial weight [d_in]; drawn from N(0, 0.01²) where None.
            gate_bias: the new gate's initial bias.

        Raises:
            ValueError: shapes that do not fit this layer, which is then as it was.
        """
        rank = len(A)
        if A.shape != (rank, self.in_features) or B.shape != (self.out_features, rank):
            raise ValueError(
                f"A has shape {list(A.shape)} and B {list(B.shape)}; "
                f"expected [r, {self.in_features}] and [{self.out_features}, r]"
            )
        if gate_weight is None:
            drawn = torch.randn(self.in_features, dtype=self.gate_weight.dtype, device=self.weight.device)
            gate_weight = drawn * GATE_INIT_STD
        elif gate_weight.shape != (self.in_features,):
            raise ValueError(
                f"gate_weight has shape {list(gate_weight.shape)}, expected [{self.in_features}]"
            )
        older_weight, older_bias = self.all_gates()
        weights = torch.cat([older_weight, gate_weight.to(older_weight)[None]])
        biases = torch.cat([older_bias, torch.as_tensor(gate_bias).to(older_bias).reshape(1)])
        self._prepared = None  # it would keep the shorter stacks
        self.A, self.B_transposed = _append(self.A, A), _append(self.B_transposed, B.mT)
        self._set_gates(weights, biases, trainable=1)

    def set_expert(self, place: int, A: torch.Tensor, B: torch.Tensor) -> None:
        """Put another expert in the place of one, whose gate stays.

        Args:
            place: of the expert, counted from the oldest.
            A: [r, d_in], with r at most the layer's `rank`.
            B: [d_out, r].
        """
        rank = len(A)
        down, up = self.A.detach().clone(), self.B_transposed.detach().clone()
        down[place, :rank], up[place, :rank] = A, B.mT
        down[place, rank:], up[place, rank:] = 0, 0
        self.A, self.B_transposed = _frozen(down), _frozen(up)

    def set_trainable_gates(self, count: int) -> None:
        """Make the newest `count` gates the trainable ones; 0 freezes all."""
        if not 0 <= count <= self.num_experts:
            raise ValueError(f"count={count}: this layer has {self.num_experts} experts")
        self._set_gates(*self.all_gates(), trainable=count)

    def _set_gates(self, weight: torch.Tensor, bias: torch.Tensor, trainable: int) -> None:
        split = len(weight) - trainable
        weight, bias = weight.detach(), bias.detach()
        self.frozen_gate_weight = _frozen(weight[:split].clone())
        self.frozen_gate_bias = _frozen(bias[:split].clone())
        self.gate_weight = nn.Parameter(weight[split:].clone(), requires_grad=trainable > 0)
        self.gate_bias = nn.Parameter(bias[split:].clone(), requires_grad=trainable > 0)
        self._join_gates()

    def _join_gates(self) -> None:
        """Let old and new gates lie side by side in memory, so that no call needs to join them."""
        for kind in ("gate_weight", "gate_bias"):
            old, new = getattr(self, f"frozen_{kind}"), getattr(self, kind)
            if (
                not movable((old, new))
                or len(old) * len(new) == 0
                or old.is_inference()
                or new.is_inference()
                or together((old, new)) is not None
                or (old.is_cpu and (old.is_shared() or new.is_shared()))  # with other processes
            ):
                continue
            self._laid[kind] = lay((old, new))

    def tensors(self) -> LayerTensors:
        """This layer's tensors as `mingle.functional` takes them."""
        return LayerTensors(self.weight, self.bias, self.A, self.B, *self.all_gates())

    def keep_packed(self) -> None:
        """Where `prepack` asks for it, see that the copies are those of the present weights."""
        if self.prepack and len(self.A) and not torch.compiler.is_compiling():
            prepacked.keep(self.weight, self.A, self.B_transposed)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., N, d_in] → [..., N, d_out]; `mask` [..., N] marks tokens that the gates' means count."""
        mask = self.counted(x) if mask is None else mask
        if self.given_gates is not None or self.gate_prior is not None:
            self.keep_packed()
            experts = LayerTensors(self.weight, self.bias, self.A, self.B, gate_weight=None, gate_bias=None)
            gates = self.gates(x, mask)
            return functional.gated_experts(
                x, *experts, reduce=self.reduce, gates=gates, backend=self.backend
            )
        if self.shared is not None:
            siblings, position = self.shared
            y = siblings.forward(position, x, mask)
            if y is not None:
                return y
        settled = mask is None and self.backend in PREPARED and not self.prepack
        if settled and not torch.compiler.is_compiling():
            known = self._prepared
            if known is None or not known.holds(self._parameters, self.backend):
                known = self._prepared = prepare(self._parameters, self.backend)
            y = None if known is None else known.forward(x, self.reduce)
            if y is not None:
                return y
        self.keep_packed()
        return functional.gated_experts(
            x,
            *self.tensors(),
            reduce=self.reduce,
            mask=mask,
            frozen_gates=self.frozen_gates,
            backend=self.backend,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MingleLinear:
        self._prepared = None
        moved = super()._apply(fn, recurse)
        prepacked.drop_stale()
        self._join_gates()
        return moved

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_prepared", None)
        return state | {"_laid": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_laid": {}} | state)
        self._join_gates()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:  # so that states of this layer and of the original one fit each other
            destination[prefix + "weight"] = destination[prefix + "weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.transposed and (weight := state_dict.get(prefix + "weight")) is not None:
            state_dict = state_dict | {prefix + "weight": weight.t()}
        # A saved layer may hold another number of experts than this one: take on its shapes before the
        # strict load compares them.
        gates = ("frozen_gate_weight", "frozen_gate_bias", "gate_weight", "gate_bias")
        for name in ("A", "B_transposed", *gates):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape and saved.shape[2:] == own.shape[2:]:
                trainable = name.startswith("gate") and len(saved) > 0
                setattr(self, name, nn.Parameter(own.new_empty(saved.shape), requires_grad=trainable))
        self._join_gates()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, experts={self.num_experts}, "
            f"rank={self.rank}, reduce={self.reduce!r}"
        )


def _repeated(gates: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gates [n, T] of samples for x [k · n, ..., d_in], a row for each; others are returned as they are."""
    rows, samples = (x.shape[0] if x.dim() > 1 else 1), len(gates)
    if gates.dim() != 2 or samples == 0 or rows % samples:
        return gates
    if samples < rows:
        gates = gates.repeat_interleave(rows // samples, 0)
    # an image whose places are in two dimensions is one sample
    return gates.view(rows, *[1] * (x.dim() - 2), gates.shape[1]) if x.dim() > 3 else gates


def _append(stack: torch.Tensor, matrix: torch.Tensor) -> nn.Parameter:
    """`stack` [T, r, d] and `matrix` [r', d] as one more entry of it: [T + 1, max(r, r'), d].

    The shorter ones are padded with zero rows; what is there is copied once.
    """
    known, rank = stack.shape[1], len(matrix)
    grown = stack.new_empty(len(stack) + 1, max(known, rank), stack.shape[2])
    grown[:-1, :known], grown[-1, :rank] = stack.detach(), matrix.detach()
    grown[:-1, known:], grown[-1, rank:] = 0, 0
    return _frozen(grown)


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(trainable, total) number of parameters of a module, experts and gates included."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
