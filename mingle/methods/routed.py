"""Routed experts: one per task, chosen per sample by Gaussians over features of the base.

Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mingle.methods.base import Arrival, Kept, StepReport, Tensors
from mingle.methods.router_choice import (
    TEMPERATURES,
    PosteriorRouter,
    TaskFeatures,
    choose,
    joined,
    measured,
    settings,
)
from mingle.methods.routing import RoutedMethod
from mingle.options import require_positive
from mingle.tasks import TaskType

#: the most depths that are tried where none are asked for
MOST_DEPTHS = 8
#: how many seed samples room is reckoned for
USUAL_SEEDS = 100


@dataclass(frozen=True)
class RoutedOptions:
    """Settings of the routed experts.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        depths: after how many transformer blocks of the base hidden states are read, together; 0 means the
            embeddings.  None tries up to eight depths one by one, and takes the first of those that tell the
            tasks' seed samples apart best.
        spread: whether the tokens' standard deviations count beside their means.
        own_covariance, shrinkage: see `mingle.methods.router.GaussianRouter`.
        temperature: what log-likelihoods are divided by.
            Of these four, what is None is chosen by the seed samples too; see
            `mingle.methods.router_choice`.
        gates: ``soft``, all experts by their posterior probability, or ``hard``, the likeliest task's expert
            alone.
        seniority: by how many nats a task is preferred to the one that arrived after it.  Where two tasks
            claim a sample, the older one already has users: this keeps their accuracy, at the newcomer's
            expense.
        abstain: samples that are stranger to the likeliest task than its seed samples are, by that many
            standard deviations on a logarithmic scale, go to the base model, which keeps what it can do
            without any task; None sends none there.  See `mingle.methods.router.strangeness`.
        backend: see `mingle.functional.gated_experts`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    depths: tuple[int, ...] | None = None
    spread: bool | None = None
    own_covariance: float | None = None
    shrinkage: float | None = None
    temperature: float | None = None
    gates: Literal["hard", "soft"] = "soft"
    seniority: float = 0.0
    abstain: float | None = 3.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        depths = self.depths
        if depths is not None and (not depths or min(depths) < 0 or len(set(depths)) < len(depths)):
            raise ValueError(
                f"depths={list(depths)}: expected one or more distinct numbers of blocks, from 0 on"
            )
        if self.own_covariance is not None and not 0 <= self.own_covariance < 1:
            raise ValueError(f"own_covariance={self.own_covariance}: expected a value in [0, 1)")
        if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage}: expected a value in (0, 1]")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected a positive, finite value")
        if not 0 <= self.seniority < math.inf:
            raise ValueError(f"seniority={self.seniority}: expected a finite value >= 0")
        if self.abstain is not None and self.abstain <= 0:
            raise ValueError(f"abstain={self.abstain}: expected a positive value")


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
        self.candidates = candidates(options.depths, len(self.router.sites))
        self.grid = settings(
            True if options.depths and len(options.depths) > 1 else options.spread,
            options.own_covariance,
            options.shrinkage,
        )
        #: for each task that has an expert, what is kept of its features at every candidate
        self.features: list[list[TaskFeatures]] = []

    def sites(self) -> list[nn.Module]:
        return [self.tower.get_submodule(block) for block in self.structure.stacks[0].blocks]

    def _merge(self, arrival: Arrival, deltas: Tensors) -> StepReport:
        read = sorted({depth for depths in self.candidates for depth in depths})
        batches = [dict(zip(read, found, strict=True)) for found in self.moments(arrival.samples(), read)]
        kept = []
        for number, depths in enumerate(self.candidates):
            features = torch.cat([joined([found[depth] for depth in depths]) for found in batches])
            kept.append(measured(features, [task[number] for task in self.features], self.grid))
        self.add_experts(deltas)
        return StepReport(notes=self._route([*self.features, kept]))

    def kept_bytes(self) -> Kept:
        widths: dict[str | None, int] = {}
        for name, layer in self.layers.items():
            widths.setdefault(self.structure.block_of(name), layer.in_features)
        blocks = self.structure.stacks[0].blocks
        numbers = 0
        for depths in self.candidates:
            features = 2 * sum(widths.get(blocks[depth], max(widths.values())) for depth in depths)
            numbers += features * (1 + min(features, USUAL_SEEDS)) + len(self.grid) * len(TEMPERATURES)
        experts = super().kept_bytes()
        return experts._replace(task=experts.task + numbers * torch.float64.itemsize)

    def _route(self, tasks: list[list[TaskFeatures]]) -> list[str]:
        """Set the router by what is kept of all tasks; returns what it chose and why."""
        options = self.options
        choice = choose(tasks, self.grid, options.temperature)
        depths = self.candidates[choice.candidate]
        self.router.router = PosteriorRouter(
            [task[choice.candidate] for task in tasks],
            choice.setting,
            choice.temperature,
            hard=options.gates == "hard",
            seniority=options.seniority,
            abstain=options.abstain,
        )
        self.router.read, self.features = depths, tasks
        return [choice.told(depths)] if len(tasks) > 1 else []

    def chooses(self) -> bool:
        return bool(self.options.gates == "hard")

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        if place is None:
            return {}
        return super().task_tensors(index) | {
            f"router.{_name(depths)}.{key}": value
            for depths, kept in zip(self.candidates, self.features[place], strict=True)
            for key, value in kept._asdict().items()
        }

    def restore(self, tasks: list[Tensors], state: Tensors) -> None:
        super().restore(tasks, state)
        kept = [
            [
                TaskFeatures(*(tensors[f"router.{_name(depths)}.{key}"] for key in TaskFeatures._fields))
                for depths in self.candidates
            ]
            for tensors in tasks
            if tensors
        ]
        if kept:
            self._route(kept)


def candidates(depths: tuple[int, ...] | None, blocks: int) -> list[tuple[int, ...]]:
    """The depths that can be read, each alone, or those that were asked for together.

    Args:
        depths: as in `RoutedOptions`.
        blocks: how many the model has.

    Raises:
        ValueError: a depth that it does not have.
    """
    if depths is None:
        count = min(MOST_DEPTHS, blocks)
        return [(round(k * (blocks - 1) / max(count - 1, 1)),) for k in range(count)]
    if max(depths) >= blocks:
        deepest = f"the model has {blocks} blocks, so {blocks - 1} is the deepest"
        raise ValueError(f"depths={list(depths)}: {deepest}")
    return [tuple(sorted(depths))]


def _name(depths: tuple[int, ...]) -> str:
    return "-".join(map(str, depths))
