"""What a router keeps of every task, and how it is set when a task was added."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mingle.methods.base import Left, Tensors
from mingle.methods.layer_router import LayerRouter, Moments
from mingle.methods.router_choice import (
    TEMPERATURES,
    PosteriorRouter,
    TaskFeatures,
    choose,
    joined,
    measured,
    settings,
)

#: the most depths that are tried where none are asked for
MOST_DEPTHS = 8
#: how many seed samples room is reckoned for
USUAL_SEEDS = 100


@dataclass(frozen=True)
class RouterOptions:
    """Settings of a router.

    Attributes:
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
    """

    depths: tuple[int, ...] | None = None
    spread: bool | None = None
    own_covariance: float | None = None
    shrinkage: float | None = None
    temperature: float | None = None
    gates: Literal["hard", "soft"] = "soft"
    seniority: float = 0.0
    abstain: float | None = 3.0

    def __post_init__(self) -> None:
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


class TaskRouter:
    """Sets the router of a model's layers by the features of all tasks so far.

    Args:
        router: of the layers, whose sites are the blocks of the first stack.
        options: see `RouterOptions`.

    Attributes:
        features: for each task that has an expert, what is kept of its features at every candidate.
    """

    def __init__(self, router: LayerRouter, options: RouterOptions) -> None:
        self.router, self.options = router, options
        self.candidates = candidates(options.depths, len(router.sites))
        self.grid = settings(
            True if options.depths and len(options.depths) > 1 else options.spread,
            options.own_covariance,
            options.shrinkage,
        )
        self.features: list[list[TaskFeatures]] = []

    @property
    def depths(self) -> list[int]:
        """All that are read of a new task."""
        return sorted({depth for depths in self.candidates for depth in depths})

    def measured(self, batches: Iterable[Sequence[Moments]]) -> list[TaskFeatures]:
        """What to keep of a new task, whose samples these are, batch by batch and at all `depths`."""
        found = [dict(zip(self.depths, moments, strict=True)) for moments in batches]
        kept = []
        for number, depths in enumerate(self.candidates):
            features = torch.cat([joined([batch[depth] for depth in depths]) for batch in found])
            kept.append(measured(features, [task[number] for task in self.features], self.grid))
        return kept

    def set(self, tasks: list[list[TaskFeatures]]) -> list[str]:
        """Set the router by what is kept of these tasks; returns what it chose and why."""
        self.features = tasks
        if not tasks:
            self.router.router = None
            return []
        options = self.options
        choice = choose(tasks, self.grid, options.temperature)
        self.router.read = self.candidates[choice.candidate]
        self.router.router = PosteriorRouter(
            [task[choice.candidate] for task in tasks],
            choice.setting,
            choice.temperature,
            hard=options.gates == "hard",
            seniority=options.seniority,
            abstain=options.abstain,
        )
        return [choice.told(self.router.read)] if len(tasks) > 1 else []

    def tensors(self, place: int) -> Tensors:
        """What is kept of a task, by names that `restored` knows."""
        return {
            f"router.{_name(depths)}.{key}": value
            for depths, kept in zip(self.candidates, self.features[place], strict=True)
            for key, value in kept._asdict().items()
        }

    def restored(self, tasks: Iterable[Mapping[str, Tensor]]) -> None:
        """Set the router by tensors as `tensors` returned them, task by task."""
        self.set(
            [
                [
                    TaskFeatures(*(tensors[f"router.{_name(depths)}.{key}"] for key in TaskFeatures._fields))
                    for depths in self.candidates
                ]
                for tensors in tasks
            ]
        )

    def without(self, left: Left, later: bool) -> Left:
        """What is kept once a task has left: the losses of the task that is now the first become 0.

        The statistics of all others stay.  So do the losses of later tasks, in which the task took part; the
        samples that would be needed to measure them again are not kept.

        Args:
            left: what is kept by the tasks' method.
            later: whether tasks with an expert arrived after it.
        """
        first = next((number for number, tensors in enumerate(left.tasks) if tensors), None)
        if not later or first is None:
            return left
        zeros = {
            key: torch.zeros_like(tensor)
            for key, tensor in left.tasks[first].items()
            if key.startswith("router.") and key.endswith(".losses")
        }
        tasks = [*left.tasks[:first], left.tasks[first] | zeros, *left.tasks[first + 1 :]]
        others = sum(bool(tensors) for tensors in tasks) - 1
        if self.fixed or not others:
            return left._replace(tasks=tasks)
        stays = (
            "the router's depth, setting and temperature are chosen by how surely seed samples were told "
            "from those of all tasks at the time, its own among them"
        )
        return left._replace(tasks=tasks, stays=[*left.stays, stays])

    @property
    def fixed(self) -> bool:
        """Whether the options leave nothing to be chosen by losses."""
        one = len(self.candidates) == 1 and len(self.grid) == 1
        return one and self.options.temperature is not None

    def kept_bytes(self, widths: Sequence[int]) -> int:
        """How much it keeps of a task, for blocks with inputs of these widths."""
        numbers = 0
        for depths in self.candidates:
            features = 2 * sum(widths[depth] for depth in depths)
            numbers += features * (1 + min(features, USUAL_SEEDS)) + len(self.grid) * len(TEMPERATURES)
        return numbers * torch.float64.itemsize


def candidates(depths: tuple[int, ...] | None, blocks: int) -> list[tuple[int, ...]]:
    """The depths that can be read, each alone, or those that were asked for together.

    Args:
        depths: as in `RouterOptions`.
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
