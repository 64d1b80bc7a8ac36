"""MINGLE whose gates are told by a router which task an input is of: a product of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mingle.methods.base import Arrival, Kept, Left, SavedTasks, StepReport, Tensors
from mingle.methods.layer_router import LayerRouter, Moments, Router
from mingle.methods.mingle import Mingle, MingleOptions
from mingle.methods.routing import RouterMethod
from mingle.methods.task_router import RouterOptions, TaskRouter
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskType


@dataclass(frozen=True)
class MingleRoutedOptions(MingleOptions):
    """Settings of MINGLE, and of the router, which sets itself as that of `routed` does.

    Attributes:
        trust: c; gates are multiplied by 1 − c + c p, p being the tasks' posterior probabilities.  0 is
            MINGLE, 1 leaves everything to the router.
    """

    trust: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trust <= 1:
            raise ValueError(f"trust={self.trust}: expected a value in [0, 1]")


class MingleRouted(RouterMethod, Mingle):
    """y = x W₀ᵀ + b + Σ_i (1 − c + c p_i) (w_i · x̄ + β_i) (x A_iᵀ) B_iᵀ, with p of the router of `routed`.

    New gates learn behind the router, so that they need not tell tasks apart by themselves.
    """

    name = "mingle-routed"
    Options = MingleRoutedOptions
    shares_blocks = False
    adapts_by_choice = False  # the router wants samples in any case

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        self.known = TaskRouter(self.router, RouterOptions())

    def made_router(self) -> LayerRouter:
        return PriorRouter(list(self.layers.values()), self.sites(), self.options.trust)

    def _merge(self, arrival: Arrival, deltas: Mapping[str, Tensor]) -> StepReport:
        earlier = self.known.features
        new = self.known.measured(self.moments_of_all(arrival.samples(), self.known.depths))
        notes = self.known.set([*earlier, new])
        try:
            report = super()._merge(arrival, deltas)
        except BaseException:
            self.known.set(earlier)
            raise
        report.notes[:0] = notes
        return report

    def kept_bytes(self) -> Kept:
        experts = super().kept_bytes()
        return experts._replace(task=experts.task + self.known.kept_bytes(self.block_widths()))

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        return {} if place is None else super().task_tensors(index) | self.known.tensors(place)

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        left = super().without(index, tasks)
        return self.known.without(left, bool(self.later(index)))

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        super().restore(tasks, state)
        self.known.restored(filter(None, tasks))


class PriorRouter(LayerRouter):
    """Gives layers factors of their own gates, as far as it is trusted.

    Args:
        layers, sites: see `LayerRouter`.
        trust: c.
    """

    def __init__(self, layers: list[MingleLinear], sites: list[nn.Module], trust: float) -> None:
        super().__init__(layers, sites)
        self.trust = trust

    def decided(self, router: Router, moments: Sequence[Moments]) -> Tensor:
        return 1 - self.trust * (1 - super().decided(router, moments))

    def give(self, layers: Iterable[MingleLinear], gates: Tensor | None) -> None:
        for layer in layers:
            layer.gate_prior = gates
