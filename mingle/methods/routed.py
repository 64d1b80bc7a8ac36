"""Routed experts: one per task, chosen per sample by Gaussians over features of the base.

Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mingle.methods.base import Arrival, Kept, Left, SavedTasks, StepReport, Tensors
from mingle.methods.routing import RoutedMethod
from mingle.methods.task_router import RouterOptions, TaskRouter
from mingle.options import require_positive
from mingle.tasks import TaskType


@dataclass(frozen=True)
class RoutedOptions(RouterOptions):
    """Settings of the routed experts, beside those of their router.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        backend: see `mingle.functional.gated_experts`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rank")


class Routed(RoutedMethod):
    """Gates by the posterior probability of tasks under Gaussians over features of the base.

    A sample's features are mean and standard deviation of its tokens' hidden states at some depth.  Adding a
    task leaves the statistics of earlier ones as they are, but may move the depth and the sureness of all
    decisions; see `mingle.methods.router_choice`.
    """

    name = "routed"
    Options = RoutedOptions

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        self.known = TaskRouter(self.router, options)

    def _merge(self, arrival: Arrival, deltas: Mapping[str, Tensor]) -> StepReport:
        new = self.known.measured(self.moments_of_all(arrival.samples(), self.known.depths))
        self.add_experts(deltas)
        return StepReport(notes=self.known.set([*self.known.features, new]))

    def kept_bytes(self) -> Kept:
        experts = super().kept_bytes()
        return experts._replace(task=experts.task + self.known.kept_bytes(self.block_widths()))

    def chooses(self) -> bool:
        return bool(self.options.gates == "hard")

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        return {} if place is None else super().task_tensors(index) | self.known.tensors(place)

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        left = super().without(index, tasks)
        return self.known.without(left, bool(self.later(index)))

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        super().restore(tasks, state)
        self.known.restored(filter(None, tasks))
