"""Where a base has the layers and tensors that a LoRA adapter names, and whether they fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from mingle.io.adapter_config import OR_WHOLE
from mingle.io.state_dicts import IncompatibleModel, first_names
from mingle.nn.adapter_files import Adapter, Change
from mingle.nn.matrices import oriented
from mingle.options import nearest
from mingle.tasks import TaskType


class AdapterFit:
    """What a LoRA adapter makes of a base, by the base's names.

    Args:
        adapter: what its folder holds.
        base: the whole base model.
        task: its task type.
        held: the adapter's whole tensors as they are taken over; of a larger vocabulary what both have.

    Attributes:
        whole: names of the base's tower → those of the adapter's whole tensors, but for the head's.
        changes: what the adapter makes of the tower's weights, by their names.
        beside: what it makes of others, by the whole model's names.

    Raises:
        IncompatibleModel: a layer or a tensor that the base does not have, has in another shape, or ties to
            others.
    """

    def __init__(self, adapter: Adapter, base: nn.Module, task: TaskType, held: Mapping[str, Tensor]) -> None:
        self._model, self._tower = base, base.get_submodule(task.tower(base))
        #: the base's tensors and its tower's, and the first name of each of the latter
        self._all, self._base = base.state_dict(), self._tower.state_dict()
        self._first = first_names(self._tower)
        #: what may stand before the tower's names, and the base's own name for what is below its head
        self._prefixes, self._inner = task.prefixes(base), getattr(base, "base_model_prefix", "")
        self._saved = adapter.saved
        self.whole = self._whole(held, task.heads(base))
        self.changes: dict[str, Change] = {}
        self.beside: dict[str, Change] = {}
        for layer, change in adapter.changes.items():
            self._take(layer, change)

    def _inside(self, name: str) -> str:
        """A layer or a tensor of the adapter by its name in the tower; one of neither keeps its own."""
        bare = name.removeprefix(next((start for start in self._prefixes if name.startswith(start)), ""))
        deeper = f"{self._inner}.{bare}"  # the adapter is of the model without its head
        return deeper if {deeper, f"{deeper}.weight"} & self._base.keys() else bare

    def _take(self, layer: str, change: Change) -> None:
        """Note what the adapter makes of a layer of the tower, or else of the whole model, if it fits it."""
        where, inside = f"the adapter's layer {layer!r}", self._inside(layer)
        name, outside = f"{inside}.weight", f"{layer}.weight"
        tower = name in self._base
        if not tower and outside not in self._all:
            near = nearest(name, self._base) or nearest(outside, self._all)
            raise IncompatibleModel(f"{where} is not in the base{near}")
        module = self._tower.get_submodule(inside) if tower else self._model.get_submodule(layer)
        if change.embedding != isinstance(module, nn.Embedding):
            raise IncompatibleModel(f"{where} is {'no' if change.embedding else 'an'} embedding in the base")
        own = self.whole.get(name) if tower else outside
        if own is not None and own in self._saved:
            weight = self._saved.described(own)
        else:
            weight = self._base[name] if tower else self._all[outside]
        found = [change.expert.B.shape[0], change.expert.A.shape[1]]
        wanted = list(as_matrix(weight, module).shape)
        if found != wanted:
            told, there = (shape[::-1] if change.embedding else shape for shape in (found, wanted))
            raise IncompatibleModel(f"{where} is {told}, in the base {there}")
        if tower:
            self._check_alone(name, where, [name])
            self.changes[name] = change
        else:
            self.beside[outside] = change

    def _whole(self, held: Mapping[str, Tensor], heads: Collection[str]) -> dict[str, str]:
        """The base tower's names of the whole tensors that the adapter has, but for the head's."""
        named: dict[str, str] = {}
        for own in (own for own in self._saved if own not in heads):
            name, where = self._inside(own), f"the adapter's tensor {own!r}"
            base = self._base.get(name, self._all.get(own))
            if base is None:
                raise IncompatibleModel(f"{where} is not in the base{nearest(own, self._all)}")
            found = held[own]
            if found.shape != base.shape or not found.is_floating_point():
                told = f"{where} is {list(found.shape)}, {found.dtype}; in the base {list(base.shape)}"
                raise IncompatibleModel(f"{told}; {OR_WHOLE}")
            if name in self._base:
                named[name] = own
        for name, own in named.items():
            self._check_alone(name, f"the adapter's tensor {own!r}", named)
        return named

    def _check_alone(self, name: str, where: str, changed: Collection[str]) -> None:
        """Refuse a change of a tensor that the base ties to others which the adapter does not change."""
        same = self._first[name]
        tied = [other for other in self._base if self._first[other] == same and other not in changed]
        if tied:
            raise IncompatibleModel(
                f"{where} is one tensor with {tied[0]!r} in the base, which the update would change too; "
                "give a base whose file holds both, apart from each other"
            )


def as_matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight as [d_out, d_in], of an embedding transposed."""
    return weight.mT if isinstance(layer, nn.Embedding) else oriented(weight, layer)
