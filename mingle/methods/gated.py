"""The common part of all methods that leave a gated low-rank expert per task and layer in the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from mingle.adaptation.mean_gates import mean_gates
from mingle.io.lazy_tensors import LazyTensors
from mingle.io.state_dicts import task_vector
from mingle.kernels.dtypes import wide
from mingle.kernels.gated_experts import reference
from mingle.methods.base import (
    Arrival,
    Folded,
    Kept,
    Left,
    MergeMethod,
    SavedTasks,
    StepReport,
    Tensors,
    others,
)
from mingle.methods.layer_deltas import LayerDeltas
from mingle.nn.inject import find_targets, inject
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.matrices import oriented, packed_experts
from mingle.nn.observe import gates_made_of
from mingle.nn.sharded import ShardedBlocks, entries
from mingle.nn.snapshot import Snapshot
from mingle.tasks import TaskData, TaskType
from mingle.tasks.masks import TokenMasks
from mingle.tasks.shares import pools_over_batches

#: what one task leaves in a layer
EXPERT_TENSORS = ("A", "B", "gate_weight", "gate_bias")


def unchanged(task: str) -> str:
    """Why a task gets no expert that changed no target layer."""
    return f"{task}: no target layer differs from the model it started from, no expert was added"


class FirstGates(NamedTuple):
    """The gates of a new task before anything trains them.

    Attributes:
        weights: w [d_in] by layer.
        bias: β, the same in all of them.
        generator: goes on where drawing them left off.
    """

    weights: Tensors
    bias: float
    generator: torch.Generator


class GatedMethod(MergeMethod):
    """One gated expert per task and target layer.

    Subclasses say how experts and gates are made.  Their `Options` have ``layers`` and ``backend``, and
    ``reduce`` where layers compute their gates themselves.
    """

    needs_seeds = True
    folds_by_means = True
    #: whether what a new expert is made of are also the earlier ones, see `expert`
    projects: ClassVar[bool] = False
    #: whether it works in a model whose blocks are shared out, see `mingle.nn.sharded`
    shares_blocks: ClassVar[bool] = False
    #: the target layers where the options name none
    layer_set: ClassVar[str]

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        super().__init__(model, task, base, options)
        self.structure = task.structure(model)
        targets = options.layers or self.structure.sets[self.layer_set]
        if not targets:
            why = next((f": {name!r} {reason}" for name, reason in self.structure.unfit.items()), "")
            if packed_experts(self.tower):
                why = ": its experts are packed into single tensors"
            what = f"linear layers in the set {self.layer_set!r} that can take experts"
            raise ValueError(f"{type(self.tower).__name__} has no {what}{why}")
        for name in find_targets(self.tower, targets):
            if reason := self.structure.unfit.get(name):
                raise ValueError(f"layer {name!r} {reason}: it cannot take experts")
        model.requires_grad_(False)
        self.layers: dict[str, MingleLinear] = inject(
            self.tower, targets, getattr(options, "reduce", "token"), backend=options.backend
        )
        for name, layer in self.layers.items():
            layer.reduce = task.reduce_for(self.structure, name, layer.reduce)
        at_once = getattr(options, "micro_batch_size", None)
        if at_once is not None and pools_over_batches(model):
            raise ValueError(
                f"micro_batch_size={at_once}: with batch gates a batch has to pass through the model whole; "
                "take sample gates"
            )
        self._mark_padding()
        #: the blocks, where they are shared out
        self.blocks: ShardedBlocks | None = None
        #: per task, its place among the experts, or None where it was skipped
        self.places: list[int | None] = []

    def _mark_padding(self) -> None:
        """Let the layers know, in every call of the model, which of their tokens are padding."""
        first: list[MingleLinear] = []
        answering: list[MingleLinear] = []
        for name, layer in self.layers.items():
            (first if self.structure.sees_first(name) else answering).append(layer)
        stack = self.structure.stacks[0].parent
        TokenMasks(first, answering).register(
            self.model, ".".join(filter(None, (self.task.tower(self.model), stack)))
        )

    def add(self, arrival: Arrival) -> StepReport:
        deltas = self._deltas(arrival.tuned)
        if not any(deltas[name].any() for name in deltas):
            self._count(merged=False)
            return StepReport(skipped=unchanged(arrival.name))
        if self.blocks is not None:  # after an error no process can run them
            report = self._merge(arrival, deltas)
            self._count(merged=True)
            return report
        before = [Snapshot.of(layer, whole=self.rewrites_tasks()) for layer in self.layers.values()]
        try:
            report = self._merge(arrival, deltas)
        except BaseException:
            for layer, each in zip(self.layers.values(), before, strict=True):
                each.put_back(layer)
            raise
        self._count(merged=True)
        return report

    def _deltas(self, tuned: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Δ [d_out, d_in] of every layer."""
        if isinstance(tuned, LazyTensors):
            return LayerDeltas(self.layers, self.start(), tuned)
        deltas = task_vector(self.start(), tuned, [f"{name}.weight" for name in self.layers])
        return {name: oriented(deltas[f"{name}.weight"], layer) for name, layer in self.layers.items()}

    def share_out(self, blocks: ShardedBlocks, device: torch.device) -> None:
        """Go on in a model whose blocks are shared out, with tensors on a device instead of the meta device.

        Args:
            blocks: of the model, which is otherwise as it was.
            device: of the model.
        """
        self.blocks = blocks

    def in_turn(self) -> Iterator[list[str]]:
        """The names of layers that may get other experts now: of blocks shared out, one's at a time."""
        of_block: dict[str, list[str]] = {}
        for name in self.layers:
            block = self.structure.block_of(name) if self.blocks is not None else ""
            of_block.setdefault(block, []).append(name)
        inside = self.task.tower(self.model)
        for block, names in of_block.items():
            whole = f"{inside}.{block}".removeprefix(".")
            with self.blocks.changed(whole) if self.blocks is not None and block else nullcontext():
                yield names

    def experts_of(self, names: Collection[str]) -> dict[str, list[LowRankExpert]]:
        """The experts of layers, oldest first; all processes call it, each for layers of its own."""
        if self.blocks is None:
            return {name: self.layers[name].experts() for name in names}
        found: dict[str, list[LowRankExpert]] = {name: [] for name in names}
        for place in range(sum(place is not None for place in self.places)):
            for name in self.layers:
                expert = self._expert_at(place, [name])[name]
                if name in found:
                    found[name].append(expert)
        return found

    def _expert_at(self, place: int, names: Collection[str]) -> dict[str, LowRankExpert]:
        """The experts at a place in layers, whole in every process; all call it with the same arguments."""
        stacks = {(name, "A"): self.layers[name].A for name in names}
        stacks |= {(name, "B"): self.layers[name].B_transposed for name in names}
        found = entries(stacks, place)
        return {name: LowRankExpert(found[name, "A"], found[name, "B"].mT) for name in names}

    def kept_bytes(self) -> Kept:
        """A, B, gate and basis of every layer."""
        basis, size = getattr(self.options, "k", 0), 0
        for layer in self.layers.values():
            width, height = layer.in_features, layer.out_features
            numbers = min(self.options.rank, width, height) * (width + height) + (basis + 1) * width + 1
            size += numbers * wide(layer.weight).itemsize
        return Kept(size, 0)

    def merges(self) -> Collection[str]:
        return [f"{name}.weight" for name in self.layers]

    def start(self) -> Mapping[str, torch.Tensor]:
        """The tower that the next model is compared with: the difference becomes an expert."""
        return self.base

    @classmethod
    def from_weights(cls, options: Any) -> bool:
        """Whether all that a task leaves is made of weights, layer by layer, where it comes without samples.

        Then `expert`, `first_gates` and `beside_expert` give it.

        Args:
            options: an instance of the method's `Options`.
        """
        return False

    def expert(self, name: str, delta: torch.Tensor, earlier: Sequence[LowRankExpert]) -> LowRankExpert:
        """A layer's new expert, with the bits that it has where those of all layers are made together.

        Args:
            name: of the layer.
            delta: its Δ [d_out, d_in].
            earlier: its experts so far; none need be given unless the method `projects`.
        """
        raise NotImplementedError

    def first_gates(self, seed: int) -> FirstGates:
        """The gates that a task starts with; 0 unless a method says otherwise.

        Args:
            seed: of everything random in this step.
        """
        weights = {name: torch.zeros(layer.in_features) for name, layer in self.layers.items()}
        return FirstGates(weights, 0.0, torch.Generator().manual_seed(seed))

    def beside_expert(self, name: str) -> Tensors:
        """What a task that came without samples leaves of a layer beside `EXPERT_TENSORS`."""
        return {}

    def notes_without_samples(self) -> list[str]:
        """What is noted of a task that came without samples, in words."""
        return []

    @abstractmethod
    def _merge(self, arrival: Arrival, deltas: Mapping[str, torch.Tensor]) -> StepReport:
        """Give every layer an expert from its Δ, and adapt.

        If it raises, `add` puts the layers back; it must leave everything else as it was.
        """

    @abstractmethod
    def _append(
        self, name: str, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, bias: float | torch.Tensor
    ) -> None:
        """Give the layer an expert, and choose which of its gates train from now on."""

    def _count(self, *, merged: bool) -> None:
        """Note one more task."""
        self.places.append(sum(place is not None for place in self.places) if merged else None)

    def adapter(self, index: int) -> dict[str, LowRankExpert]:
        place = self.places[index]
        if place is None:
            return {}
        return {name: LowRankExpert(layer.A[place], layer.B[place]) for name, layer in self.layers.items()}

    def folded(self, index: int, samples: TaskData | None) -> Folded:
        gates = self.own_gates(index)
        if samples is not None and self.folds_by_means:
            gates |= mean_gates(self.task, self.model, self.layers, samples)
        return Folded(self.fold(gates), gates, self.by_task(gates))

    def by_task(self, gates: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Gates [T] by layer as those of tasks that have experts, [T, L], float64."""
        return torch.stack([each.double() for each in gates.values()], 1)

    def own_gates(self, index: int) -> Tensors:
        """Gates [T] by layer that let the task's own expert work alone; all 0 if the task was skipped."""
        place = self.places[index]
        gates = {name: torch.zeros_like(layer.all_gates()[1]) for name, layer in self.layers.items()}
        for gate in gates.values() if place is not None else ():
            gate[place] = 1
        return gates

    @contextmanager
    def only(self, tasks: Collection[int]) -> Iterator[None]:
        """Inside the block the experts of these tasks answer, as if there were no others."""
        own = [self.own_gates(index) for index in sorted(tasks)]
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                kept = torch.stack([torch.zeros_like(layer.all_gates()[1]), *(gates[name] for gates in own)])
                make = partial(self.remaining, kept.amax(0))
                stack.enter_context(gates_made_of({name: layer}, make))
            yield

    @contextmanager
    def alone(self, index: int) -> Iterator[None]:
        """Inside the block the task's own expert answers with a gate of 1, and no other; see `own_gates`."""
        with ExitStack() as stack:
            for name, gates in self.own_gates(index).items():
                stack.enter_context(gates_made_of({name: self.layers[name]}, gates.expand_as))
            yield

    def remaining(self, kept: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """What the gates [..., T] of a layer would be if it had certain experts only: 0 for the others.

        Args:
            kept: 1 for those that it would have and 0 for the others, [T].
            gates: of all of them.
        """
        return gates * kept.to(gates)

    def fold(self, gates: Mapping[str, torch.Tensor]) -> Tensors:
        """The tower as plain weights, W₀ + Σ_i g_i B_i A_i in every layer, for its gates [T]."""
        weights = {}
        for name, layer in self.layers.items():
            W, A, B = (part.to(wide(part)) for part in (layer.weight, layer.A, layer.B))
            folded = reference.fold(W, A, B, gates[name]).to(layer.weight)
            weights[f"{name}.weight"] = oriented(folded, layer)
        return dict(self.base) | weights

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        if place is None:
            return {}
        tensors, experts = Tensors(), self._expert_at(place, self.layers)
        for name, layer in self.layers.items():
            weight, bias = layer.all_gates()
            values = (*experts[name], weight[place], bias[place])
            tensors |= {
                f"{name}.{key}": value.detach() for key, value in zip(EXPERT_TENSORS, values, strict=True)
            }
        return tensors

    def state_tensors(self) -> Tensors:
        return {}

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        """Experts and gates of all other tasks stay bit for bit.

        Subclasses add what of the task stays in these.
        """
        return Left(others(index, tasks), self.state_tensors(), [])

    def later(self, index: int) -> list[int]:
        """The tasks with an expert that arrived after task `index`; none where that has no expert itself."""
        if self.places[index] is None:
            return []
        return [task for task in range(index + 1, len(self.places)) if self.places[task] is not None]

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        for tensors in tasks:
            self._count(merged=bool(tensors))
        for names in self.in_turn():
            for tensors in filter(None, tasks):
                for name in names:
                    self._append(name, *(tensors[f"{name}.{key}"] for key in EXPERT_TENSORS))
