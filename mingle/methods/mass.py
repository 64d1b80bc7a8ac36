"""MASS: experts chosen by how much of an input their subspaces hold (Crisostomi et al., arXiv 2504.05342)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mingle.methods.base import Arrival, SavedTasks, StepReport, Tensors
from mingle.methods.layer_router import Moments
from mingle.methods.routing import RoutedMethod
from mingle.nn.linear import MingleLinear
from mingle.options import require_positive
from mingle.tasks import TaskType


@dataclass(frozen=True)
class MassOptions:
    """Settings of MASS.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        depth: the block whose first MLP layer decides, counted from 0; None takes the one after a quarter
            of the blocks.
        temperature: what residuals are divided by.
        threshold: the weight that a task needs to take part.
        most: how many tasks take part at most.
        backend: see `mingle.functional.gated_experts`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    depth: int | None = None
    temperature: float = 1.0
    threshold: float = 0.2
    most: int = 2
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank", "most")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive value")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a value in [0, 1]")


class ResidualRouter:
    """Weights softmax(−‖z − V_iᵀ V_i z‖ / τ) of a layer's mean input z [d] for every task.

    Tasks with a weight above the threshold get a gate of 1, the heaviest ones if they are too many; the
    heaviest takes part in any case.

    Args:
        layer: whose experts' input directions V_i [r, d] decide.
        options: see `MassOptions`.
    """

    among: Tensor | None = None

    def __init__(self, layer: MingleLinear, options: MassOptions) -> None:
        self.layer, self.options = layer, options

    def residuals(self, moments: Sequence[Moments]) -> Tensor:
        """[n, T]."""
        z = moments[0].mean.float()
        outside = [z - (z @ V.mT) @ V for V in map(input_directions, self.layer.A)]
        residuals = torch.stack([part.norm(dim=1) for part in outside], 1)
        return residuals if self.among is None else residuals.masked_fill(~self.among, torch.inf)

    def likeliest(self, moments: Sequence[Moments]) -> Tensor:
        return self.residuals(moments).argmin(1)

    def shares(self, moments: Sequence[Moments]) -> Tensor:
        return (-self.residuals(moments) / self.options.temperature).softmax(1)

    def gates(self, moments: Sequence[Moments]) -> Tensor:
        weights = self.shares(moments)
        heaviest = weights.topk(min(self.options.most, weights.shape[1]), 1)
        taking = heaviest.values > self.options.threshold
        taking[:, 0] = True
        return torch.zeros_like(weights).scatter(1, heaviest.indices, taking.to(weights))


class Mass(RoutedMethod):
    """W₀ + Σ_i g_i(x) B_i A_i, its gates 0 or 1 by the residuals of x at one layer; no data are needed.

    In the paper a first pass goes through the tasks' TSV-M merge and the chosen tasks are merged by TSV-M
    again; here it goes through the base, and their experts are added up.
    """

    name = "mass"
    Options = MassOptions
    needs_seeds = False

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        self.router.read = (0,)

    def sites(self) -> list[nn.Module]:
        blocks, depth = self.structure.stacks[0].blocks, self.options.depth
        if depth is None:
            depth = len(blocks) // 4
        if not 0 <= depth < len(blocks):
            raise ValueError(f"depth={depth}: the model has {len(blocks)} blocks, numbered from 0")
        inside = [name for name in self.layers if self.structure.block_of(name) == blocks[depth]]
        first = [name for name in inside if name in self.structure.layers["mlp"]] or inside
        if not first:
            raise ValueError(f"depth={depth}: no target layer is in block {blocks[depth]!r}")
        self.deciding = first[0]
        return [self.layers[self.deciding]]

    @classmethod
    def from_weights(cls, options: Any) -> bool:
        return True

    def _merge(self, arrival: Arrival, deltas: Mapping[str, Tensor]) -> StepReport:
        self.add_experts(deltas)
        self._decide()
        return StepReport(notes=self.notes_without_samples())

    def notes_without_samples(self) -> list[str]:
        layer = self.layers[self.deciding]
        rank = min(self.options.rank, layer.in_features, layer.out_features)
        if rank < layer.in_features:
            return []
        told = f"{self.deciding} has {layer.in_features} inputs, and experts of rank {rank} span them all"
        return [f"{told}: rounding decides which task an input is for; give a lower rank"]

    def _decide(self) -> None:
        self.router.router = ResidualRouter(self.layers[self.deciding], self.options)

    def chooses(self) -> bool:
        return bool(self.options.most == 1)

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        super().restore(tasks, state)
        if any(tasks):
            self._decide()


def input_directions(A: Tensor) -> Tensor:
    """The right singular vectors V [r, d_in], float32, of an expert with A = Σ V [r, d_in]; 0 where Σ is."""
    return torch.nn.functional.normalize(A.float(), dim=-1, eps=1e-12)
