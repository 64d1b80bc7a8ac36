"""The experts of a new task made layer by layer, by methods that need nothing but weights for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.io.journal import TASKS_BEFORE, Journal, PartFiles
from mingle.io.lazy_tensors import row_blocks
from mingle.kernels.dtypes import wide
from mingle.merging.finetuned import FineTuned
from mingle.merging.finite import refuse
from mingle.merging.parts import Parts
from mingle.methods.base import Tensors
from mingle.methods.gated import EXPERT_TENSORS, FirstGates, GatedMethod, unchanged
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.matrices import oriented
from mingle.tasks.loading import BaseTensors


class Made(NamedTuple):
    """What merging a model has left.

    Attributes:
        tensors: of the task alone; none where it was skipped.
        skipped: why it was, or None.
        notes: things worth telling.
    """

    tensors: Mapping[str, Tensor]
    skipped: str | None
    notes: list[str]


class ExpertStep:
    """The pass over all target layers that merges one model.

    Args:
        method: the merger's, on the meta device.
        values: the whole base's tensors.
        earlier: the files of earlier tasks that have experts.
        name: the task's.
        tuned: the fine-tuned model.
        seed: of everything random.
        before: how many tasks are merged.
        notes: what an interrupted run of this very step has finished.
        part_bytes: it goes in parts of about so many.
    """

    def __init__(
        self,
        method: GatedMethod,
        values: BaseTensors,
        earlier: Sequence[PartFiles],
        name: str,
        tuned: FineTuned,
        seed: int,
        before: int,
        notes: Journal,
        part_bytes: int,
    ) -> None:
        self.method, self.values, self.earlier = method, values, earlier
        self.task, self.tuned, self.seed, self.before, self.notes = name, tuned, seed, before, notes
        sizes = {name: bytes_of_expert(method, layer) for name, layer in method.layers.items()}
        self.parts = Parts(sizes, self._work, part_bytes, notes)

    def run(self) -> Made:
        """Make the experts; what earlier runs have finished is taken."""
        self._check_others()
        begun = self.notes.finished(0)
        if not begun and not any(bool(self._delta(name).any()) for name in self.method.layers):
            return Made({}, unchanged(self.task), [])
        gates = self.method.first_gates(self.seed)
        for place, names in self.parts.mine(0):
            made = {key: tensor for name in names for key, tensor in self._layer(name, gates).items()}
            self.notes.write(0, place, made, aside=True)
        self.notes.share(0)
        self.notes.conclude(0, {TASKS_BEFORE: self.before})
        files = PartFiles(self.notes.folder, self.notes.parts(0))
        return Made(files, None, self.method.notes_without_samples())

    def _work(self, name: str) -> float:
        """What making a layer's expert costs beside others', in no unit: a product with its Gram matrix."""
        layer = self.method.layers[name]
        return layer.in_features * layer.out_features * min(layer.in_features, layer.out_features)

    def _layer(self, name: str, gates: FirstGates) -> Tensors:
        """What the task leaves of a layer, by the names that it is saved under."""
        layer, earlier = self.method.layers[name], self.earlier if self.method.projects else ()
        before = [LowRankExpert(files[f"{name}.A"], files[f"{name}.B"]) for files in earlier]
        expert = self.method.expert(name, oriented(self._delta(name), layer), before)
        weight = gates.weights[name].to(layer.gate_weight.dtype)
        bias = torch.as_tensor(gates.bias).to(weight)
        kept = (expert.A.to(layer.weight.dtype), expert.B.to(layer.weight.dtype), weight, bias)
        tensors = dict(zip(EXPERT_TENSORS, kept, strict=True)) | self.method.beside_expert(name)
        named = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        for key, tensor in named.items():
            refuse(self.method, self.task, key, tensor)
        return named

    def _delta(self, name: str) -> Tensor:
        """Δ of a layer's weight, as it is kept."""
        base = self.values[f"{self.tuned.prefix}{name}.weight"]
        return self.tuned.tensor(f"{name}.weight", base).sub_(base.to(wide(base)))

    def _check_others(self) -> None:
        """Refuse a model with NaN or infinite weights where nothing is merged, too.

        Raises:
            IncompatibleModel, CheckpointError: see `FineTuned.tensors`.
        """
        merged = self.method.merges()
        for name in self.tuned.own.keys() - merged:
            dtype = self.tuned.base[name].dtype
            for rows in row_blocks(self.tuned.base[name]) if self.tuned.in_rows(name) else [...]:
                self.tuned.tensor(name, torch.empty(0, dtype=dtype), rows)


def bytes_of_expert(method: GatedMethod, layer: MingleLinear) -> int:
    """What a task that came without samples leaves of a layer."""
    width, height = layer.in_features, layer.out_features
    rank = min(method.options.rank, width, height)
    gate = (width + 1) * wide(layer.weight).itemsize
    return rank * (width + height) * layer.weight.itemsize + gate


def check_experts(method: GatedMethod, files: PartFiles, found: Sequence[str]) -> None:
    """Raise `ValueError` for tensors of a task that are not what the method leaves of one.

    Args:
        method: fitted to the base or its skeleton.
        files: the task's.
        found: the names of the method's tensors in them.
    """
    expected: dict[str, list[int]] = {}
    beside = set()
    for name, layer in method.layers.items():
        width, height = layer.in_features, layer.out_features
        rank = min(method.options.rank, width, height)
        shapes: tuple[list[int], ...] = ([rank, width], [height, rank], [width], [])
        expected |= {f"{name}.{key}": shape for key, shape in zip(EXPERT_TENSORS, shapes, strict=True)}
        beside |= {f"{name}.{key}" for key in method.beside_expert(name)}
    for key in found:
        if key not in expected and key not in beside:
            raise ValueError(f"there is no place for {key!r}")
    for key in sorted(beside.union(expected).difference(found)):
        raise ValueError(f"{key!r} is missing")
    for key, shape in expected.items():
        if (there := list(files.described(key).shape)) != shape:
            raise ValueError(f"{key!r} is {there}, expected {shape}")
