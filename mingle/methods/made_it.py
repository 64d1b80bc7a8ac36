"""MADE-IT: experts that join where their subspaces agree, chosen layer by layer (arXiv 2604.22464).

The method's code is not public; `MadeIt` says what had to be guessed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mingle import linalg
from mingle.kernels.gated_experts import reference
from mingle.methods.base import Arrival, Kept, Left, MergeMethod, SavedTasks, StepReport, Tensors
from mingle.methods.experts import concatenated, shared_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.mass import input_directions
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.tasks import TaskType

#: subspaces of that affinity are the same
_SAME = 0.8


@dataclass(frozen=True)
class MadeItOptions:
    """Settings of MADE-IT.

    Attributes:
        share: r of every expert, as a share of min(d_out, d_in).
        spread: a new expert joins the closest old one of its layer where their affinity is above the mean of
            all affinities by that many standard deviations.
        temperature: what alignments are divided by, before a softmax over a layer's experts.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        reduce: what a decision is about: each token, or, by means over its tokens, a sample or the batch.
        backend: see `mingle.functional.gated_experts`.
    """

    share: float = 0.1
    spread: float = 1.0
    temperature: float = 0.01
    layers: tuple[str, ...] | None = None
    reduce: Literal["token", "sample", "batch"] = "sample"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: expected a value in (0, 1]")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive value")


def affinity(V: Tensor, W: Tensor) -> float:
    """‖V Wᵀ‖² / r of the orthonormal rows of V and W [r, d]: 1 for equal subspaces, 0 for orthogonal ones."""
    return float((V.double() @ W.double().mT).square().sum()) / len(V)


def averaged(old: LowRankExpert, members: int, new: LowRankExpert) -> LowRankExpert:
    """The mean update of `members` tasks and one more, of the same rank as before.

    Args:
        old: the mean of the `members`.
        members: how many tasks it stands for.
        new: one more task's.
    """
    share = 1 / (members + 1)
    B, A = concatenated([LowRankExpert((1 - share) * old.A, old.B), LowRankExpert(share * new.A, new.B)])
    U, S, Vh = linalg.factored_svd(B, A)
    rank = len(old.A)
    return LowRankExpert((S[:rank, None] * Vh[:rank]).to(old.A), U[:, :rank].to(old.B))


def alignments(x: Tensor, A: Tensor) -> Tensor:
    """‖V_i x‖² / ‖x‖² [..., T], the share of x [..., d] in every expert's input subspace.

    Args:
        x: [..., d].
        A: [T, r, d]; each with orthogonal rows.
    """
    V = input_directions(A)
    inside = (x.float() @ V.flatten(0, 1).mT).unflatten(-1, V.shape[:2]).square().sum(-1)
    return inside / x.float().square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class MadeIt(GatedMethod):
    """In every layer W₀ + Σ_i g_i(x) B_i A_i, g the softmax of the alignments of x; nothing is trained.

    An expert is the truncated SVD of a task vector.  Where a layer has one whose input subspace is close to
    the new one, the new task joins it; elsewhere it brings an expert of its own.

    Guessed, for want of code: that affinities are between input subspaces; that the threshold counts the
    affinities of all layers; that an expert stands for the mean of its tasks' updates; that alignments are
    averaged over a sample's tokens, and the temperature of their softmax.
    """

    name = "made-it"
    Options = MadeItOptions
    needs_seeds = False
    needs_answers = False
    layer_set = "full"

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        #: by layer, which of its experts each task has; -1 where the task was skipped
        self.owned: dict[str, list[int]] = {name: [] for name in self.layers}
        for layer in self.layers.values():
            layer.register_forward_pre_hook(Alignment(options.temperature))
            layer.register_forward_hook(_forget)

    def _merge(self, arrival: Arrival, deltas: Mapping[str, Tensor]) -> StepReport:
        new = self._experts(deltas)
        affinities = {
            name: [affinity(V, input_directions(new[name].A)) for V in map(input_directions, layer.A)]
            for name, layer in self.layers.items()
        }
        limit = threshold([value for values in affinities.values() for value in values], self.options.spread)
        owned = {}
        for name, values in affinities.items():
            closest = max(range(len(values)), key=values.__getitem__, default=len(values))
            if values and values[closest] > limit:
                self._join(name, closest, new[name])
                owned[name] = closest
            else:
                self._append(name, *new[name], torch.zeros(self.layers[name].in_features), 0.0)
                owned[name] = len(values)
        joined = sum(owned[name] < len(affinities[name]) for name in owned)
        for name, expert in owned.items():
            self.owned[name].append(expert)
        return StepReport(notes=[f"joined older experts in {joined} of {len(owned)} layers"])

    def _experts(self, deltas: Mapping[str, Tensor]) -> dict[str, LowRankExpert]:
        """The truncated Δ of every layer."""
        by_rank: dict[int, Tensors] = {}
        for name, delta in deltas.items():
            by_rank.setdefault(math.ceil(self.options.share * min(delta.shape)), {})[name] = delta
        experts: dict[str, LowRankExpert] = {}
        for rank, own in by_rank.items():
            experts |= shared_experts(own, dict.fromkeys(own, ()), rank)
        return {name: experts[name] for name in deltas}

    def _join(self, name: str, place: int, new: LowRankExpert) -> None:
        layer = self.layers[name]
        members = self.owned[name].count(place)
        layer.set_expert(place, *averaged(layer.experts()[place], members, new))

    def _append(self, name: str, A: Tensor, B: Tensor, gate: Tensor, bias: float | Tensor) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates(0)

    def _count(self, *, merged: bool) -> None:
        super()._count(merged=merged)
        if not merged:
            for owned in self.owned.values():
                owned.append(-1)

    def own_gates(self, index: int) -> Tensors:
        gates = {name: torch.zeros_like(layer.all_gates()[1]) for name, layer in self.layers.items()}
        for name, gate in gates.items():
            if self.owned[name][index] >= 0:
                gate[self.owned[name][index]] = 1
        return gates

    def remaining(self, kept: Tensor, gates: Tensor) -> Tensor:
        """The softmax over the others' alignments."""
        gates = super().remaining(kept, gates)
        return gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)

    def by_task(self, gates: Mapping[str, Tensor]) -> Tensor:
        owned = {name: [place for place in places if place >= 0] for name, places in self.owned.items()}
        return torch.stack([gates[name].double()[places] for name, places in owned.items()], 1)

    def adapter(self, index: int) -> dict[str, LowRankExpert]:
        return MergeMethod.adapter(self, index)  # tasks share experts

    def kept_bytes(self) -> Kept:
        experts = sum(
            math.ceil(self.options.share * min(layer.weight.shape)) * sum(layer.weight.shape)
            for layer in self.layers.values()
        )
        return Kept(4 * experts, 0)  # in the state, which holds those of all tasks

    def task_tensors(self, index: int) -> Tensors:
        return {}

    def state_tensors(self) -> Tensors:
        tensors: Tensors = {}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.A": layer.A.detach(), f"{name}.B": layer.B.detach()}
            tensors[f"{name}.owned"] = torch.tensor(self.owned[name], dtype=torch.int64)
        return tensors

    def rewrites_tasks(self) -> bool:
        return True  # all experts are in the state, which grows

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        """Its own experts go.

        Raises:
            ValueError: it shares an expert with another task; the message names the layer.
        """
        left = super().without(index, tasks)
        state = dict(left.state)
        for name, owned in self.owned.items():
            own = owned[index]
            if own < 0:
                kept = owned
            elif owned.count(own) > 1:
                raise ValueError(
                    f"method {self.name!r}: in layer {name!r} it shares an expert with other tasks, which is "
                    "the mean of their updates, and no single one can be taken out again"
                )
            else:
                for half in ("A", "B"):
                    experts = left.state[f"{name}.{half}"]
                    state[f"{name}.{half}"] = torch.cat([experts[:own], experts[own + 1 :]])
                kept = [place - (place > own) for place in owned]
            state[f"{name}.owned"] = torch.tensor([*kept[:index], *kept[index + 1 :]], dtype=torch.int64)
        beside = "which experts later tasks joined was decided beside it, and stays"
        return Left(left.tasks, state, [beside] if self.later(index) else [])

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        for name, layer in self.layers.items():
            for A, B in zip(state[f"{name}.A"], state[f"{name}.B"], strict=True):
                self._append(name, A, B, torch.zeros(layer.in_features), 0.0)
        first = next(iter(self.layers))
        for owner in state[f"{first}.owned"].tolist():
            super()._count(merged=owner >= 0)
        self.owned = {name: state[f"{name}.owned"].tolist() for name in self.layers}


class Alignment:
    """A hook before a layer's call that gives it the softmax of the alignments of its input."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, layer: MingleLinear, args: tuple[Tensor, ...]) -> None:
        if not layer.num_experts:
            return
        x = args[0]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            shares = reference.pooled_input(alignments(x, layer.A), layer.reduce, layer.counted(x))
            layer.given_gates = (shares / self.temperature).softmax(-1)


def _forget(layer: MingleLinear, *_: Any) -> None:
    layer.given_gates = None


def threshold(affinities: Sequence[float], spread: float) -> float:
    """The affinity above which experts join: the mean and that many standard deviations of all there are.

    Subspaces that are nearly the same join in any case, or none would where many are.
    """
    if len(affinities) < 2:
        return _SAME
    return min(statistics.fmean(affinities) + spread * statistics.stdev(affinities), _SAME)
