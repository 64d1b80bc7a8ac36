"""A merge as a plain model whose tensors are made one after another, from the files of base and merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mingle.io.journal import PartFiles
from mingle.io.lazy_tensors import LazyTensors, Rows, rows_of
from mingle.io.state_dicts import first_names
from mingle.kernels.dtypes import wide
from mingle.kernels.gated_experts import reference
from mingle.methods.gated import GatedMethod
from mingle.nn.linear import MingleLinear
from mingle.nn.matrices import oriented
from mingle.tasks.loading import BaseTensors


@dataclass(frozen=True)
class Fold:
    """Experts that are folded into the weights of their layers, see `GatedMethod.fold`.

    Attributes:
        method: on the meta device.
        experts: the files of the tasks that have any, oldest first.
        gates: the constant gates [T] of all experts; None for those that the files hold.
    """

    method: GatedMethod
    experts: Sequence[PartFiles]
    gates: Tensor | None

    def weight(self, name: str, base: Tensor) -> Tensor:
        """W₀ + Σ_i g_i B_i A_i of a layer, as it is kept."""
        layer = self.method.layers[name]
        weight = oriented(base, layer)
        A, B, gates = self._stacked(name, layer, weight)
        folded = reference.fold(weight.to(wide(weight)), A.to(wide(A)), B.to(wide(B)), gates)
        return oriented(folded.to(weight), layer)

    def _stacked(self, name: str, layer: MingleLinear, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.experts:
            none = (weight.new_empty(0, 0, layer.in_features), weight.new_empty(0, layer.out_features, 0))
            return *none, torch.empty(0, dtype=wide(weight))
        A = torch.stack([files[f"{name}.A"] for files in self.experts])
        # as a layer keeps them, on which the order of sums depends
        B = torch.stack([files[f"{name}.B"].mT.contiguous() for files in self.experts]).mT
        if self.gates is not None:
            return A, B, self.gates.to(wide(weight))
        return A, B, torch.stack([files[f"{name}.gate_bias"] for files in self.experts])


class PlainModel(LazyTensors):
    """All tensors of a merged model by their names in the base, of tied ones the first.

    Args:
        base: the base's skeleton.
        values: the base's tensors.
        prefix: what comes before the names of the tower's tensors.
        merged: what was merged: experts to be folded, or the files with ``merged/<name in the tower>``.
        head: tensors of a task's own, by their names in the base.
    """

    def __init__(
        self,
        base: nn.Module,
        values: BaseTensors,
        prefix: str,
        merged: Fold | Mapping[str, Tensor],
        head: Mapping[str, Tensor],
    ) -> None:
        state = base.state_dict()
        self._described = {name: state[name] for name in dict.fromkeys(first_names(base).values())}
        self._described |= {name: tensor.to(state[name].dtype) for name, tensor in head.items()}
        super().__init__(self._described)
        self._values, self._prefix, self._merged, self._head = values, prefix, merged, set(head)

    def described(self, name: str) -> Tensor:
        return self._described[name]

    def rows(self, name: str, rows: Rows) -> Tensor:
        if name in self._head:
            return self._described[name][rows]
        inside = self._changed(name)
        if inside is None:
            return self._values.rows(name, rows)
        if isinstance(self._merged, Fold):
            return self._merged.weight(inside.removesuffix(".weight"), self._values[name])[rows]
        return rows_of(self._merged, f"merged/{inside}", rows).to(self._described[name].dtype)

    def in_rows(self, name: str) -> bool:
        if name in self._head:
            return True
        if self._changed(name) is None:
            return self._values.in_rows(name)
        return not isinstance(self._merged, Fold)

    def _changed(self, name: str) -> str | None:
        """The name in the tower of a tensor that is not the base's; None for any other."""
        inside = name.removeprefix(self._prefix)
        if not name.startswith(self._prefix):
            return None
        if isinstance(self._merged, Fold):
            return inside if inside in self._merged.method.merges() else None
        return inside if f"merged/{inside}" in self._merged else None
