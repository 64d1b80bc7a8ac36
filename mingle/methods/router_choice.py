"""How a router is set: where it reads the base, and how sure it is, chosen by the tasks' own seed samples.

When a task arrives, each of its seed samples is left out in turn and given to the tasks so far, at every
candidate depth and in every setting.  What is kept of that are the mean losses −log p(own task), a few
numbers for each; their mean over tasks decides.  Neither labels nor samples of earlier tasks are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mingle.methods.layer_router import Moments
from mingle.methods.router import (
    FeatureSpace,
    FeatureStatistics,
    GaussianRouter,
    strangeness,
    strangeness_left_out,
)

#: what log-likelihoods are divided by, so that posteriors are as sure as they are right
TEMPERATURES = tuple(2 ** (k / 2) for k in range(15))
#: Gates under this share are closed: experts that hardly count would cost as much as those that do.
_NEGLIGIBLE = 0.01
#: nats per sample that a deeper candidate has to gain: reading deeper costs time on every input
_WORTH = 0.02


@dataclass(frozen=True)
class Setting:
    """One way to use the features of a candidate.

    Attributes:
        spread: whether the standard deviations over tokens count beside the means.
        own, shrinkage: see `GaussianRouter`.
    """

    spread: bool
    own: float
    shrinkage: float

    def router(self, space: FeatureSpace) -> GaussianRouter:
        """The Gaussians of tasks in this setting."""
        return GaussianRouter(space, own=self.own, shrinkage=self.shrinkage)


def settings(spread: bool | None, own: float | None, shrinkage: float | None) -> tuple[Setting, ...]:
    """All combinations of what is not fixed."""
    return tuple(
        Setting(*values)
        for values in product(
            (False, True) if spread is None else (spread,),
            (0.0, 0.1, 0.3) if own is None else (own,),
            (0.2, 0.5) if shrinkage is None else (shrinkage,),
        )
    )


class TaskFeatures(NamedTuple):
    """What is kept of a task's seed samples at one candidate.

    Attributes:
        mean, factor, samples: see `FeatureStatistics`; of the means over tokens first, then of the standard
            deviations.
        losses: mean −log p(own task) of the samples left out, by setting and temperature, [S, K]; 0 for a
            first task.
        strange: mean and standard deviation of the logarithms of the samples' strangeness, [2].
    """

    mean: Tensor
    factor: Tensor
    samples: Tensor
    losses: Tensor
    strange: Tensor

    @property
    def statistics(self) -> FeatureStatistics:
        return FeatureStatistics(self.mean, self.factor, self.samples)


def measured(features: Tensor, earlier: Sequence[TaskFeatures], grid: Sequence[Setting]) -> TaskFeatures:
    """What to keep of a new task.

    Args:
        features: of its seed samples, [n, F], means first.
        earlier: what is kept of the tasks before it.
        grid: the settings.
    """
    own = FeatureStatistics.of(features)
    tasks = [*(task.statistics for task in earlier), own]
    losses = torch.zeros(len(grid), len(TEMPERATURES), dtype=torch.float64, device=features.device)
    space = cache(partial(_space, tasks))
    for row, setting in zip(losses, grid, strict=True) if earlier else ():
        gaussians = setting.router(space(setting.spread))
        scores = gaussians.scores_left_out(used(features, setting.spread))
        for k, temperature in enumerate(TEMPERATURES):
            row[k] = -(scores / temperature).log_softmax(1)[:, -1].mean()
    logs = strangeness_left_out(features, own).clamp_min(torch.finfo(torch.float64).tiny).log()
    return TaskFeatures(*own, losses, torch.stack([logs.mean(), logs.std()]))


class Choice(NamedTuple):
    """A candidate, by its number, a setting and a temperature, and the loss that speaks for them.

    Attributes:
        losses: the least loss at every candidate.
    """

    candidate: int
    setting: Setting
    temperature: float
    losses: tuple[float, ...]

    def told(self, depths: tuple[int, ...]) -> str:
        """In words, for a candidate that reads these depths."""
        what = "means and standard deviations" if self.setting.spread else "means"
        blocks = "block" if depths == (1,) else "blocks"
        where = f"after {', '.join(map(str, depths))} {blocks}" if any(depths) else "of the embeddings"
        right = math.exp(-self.losses[self.candidate])
        return (
            f"routing reads {what} {where}: seed samples left out are given to their own task with a "
            f"probability of {100 * right:.0f} %"
        )


def choose(
    tasks: Sequence[Sequence[TaskFeatures]], grid: Sequence[Setting], temperature: float | None
) -> Choice:
    """The first candidate whose best loss is close to the least of all, and its best setting.

    Args:
        tasks: what is kept of every task, candidate by candidate, shallow ones first.
        grid: the settings.
        temperature: a fixed one, or None.
    """
    informed = tasks[1:] or tasks
    losses = torch.stack(
        [torch.stack([task[c].losses for task in informed]).mean(0) for c in range(len(tasks[0]))]
    )
    if temperature is not None:
        nearest = min(range(len(TEMPERATURES)), key=lambda k: abs(TEMPERATURES[k] - temperature))
        losses = losses[:, :, nearest : nearest + 1]
    least = losses.flatten(1).amin(1)
    candidate = int((least <= least.min() + _WORTH).nonzero()[0])
    place, k = divmod(int(losses[candidate].argmin()), losses.shape[2])
    return Choice(candidate, grid[place], temperature or TEMPERATURES[k], tuple(least.tolist()))


class PosteriorRouter:
    """Gates by the posterior probability of tasks, from features at the candidate that was chosen.

    Args:
        tasks: what is kept of every task at this candidate, oldest first.
        setting: how features are used.
        temperature: of the posterior.
        hard: only the likeliest task's gate is open; else all are, by their posterior probability.
        seniority: nats by which a task is preferred to the one after it.
        abstain: samples whose strangeness to the likeliest task is that many standard deviations above what
            its own samples have, on a logarithmic scale, get no expert; None for none.
    """

    among: Tensor | None = None

    def __init__(
        self,
        tasks: Sequence[TaskFeatures],
        setting: Setting,
        temperature: float,
        *,
        hard: bool,
        seniority: float,
        abstain: float | None,
    ) -> None:
        statistics = [task.statistics for task in tasks]
        self.gaussians = setting.router(_space(statistics, setting.spread))
        self.setting, self.temperature = setting, temperature
        self.hard, self.seniority = hard, seniority
        self.means = torch.stack([task.mean for task in statistics])
        self.variances = torch.stack([task.variances for task in statistics])
        self.limits = None
        if abstain is not None:
            means, deviations = torch.stack([task.strange for task in tasks]).unbind(1)
            self.limits = (means + abstain * deviations).exp()

    def scores(self, features: Tensor) -> Tensor:
        """Tempered log-likelihoods [n, T] of features [n, F], older tasks preferred."""
        scores = self.gaussians.scores(used(features, self.setting.spread)) / self.temperature
        older = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
        scores = scores + self.seniority * older
        return scores if self.among is None else scores.masked_fill(~self.among, -math.inf)

    def likeliest(self, moments: Sequence[Moments]) -> Tensor:
        return self.scores(joined(moments)).argmax(1)

    def shares(self, moments: Sequence[Moments]) -> Tensor:
        return self.scores(joined(moments)).softmax(1)

    def gates(self, moments: Sequence[Moments]) -> Tensor:
        features = joined(moments)
        scores = self.scores(features)
        likeliest = scores.argmax(1)
        gates = F.one_hot(likeliest, scores.shape[1]).double() if self.hard else scores.softmax(1)
        gates = torch.where(gates < _NEGLIGIBLE, 0.0, gates)
        gates = gates / gates.sum(1, keepdim=True)
        if self.limits is not None:
            strange = strangeness(features, self.means[likeliest], self.variances[likeliest])
            gates = gates * (strange <= self.limits[likeliest]).unsqueeze(1)
        return gates.float()


def joined(moments: Sequence[Moments]) -> Tensor:
    """Features [n, F] from one or more sites: all means, then all standard deviations."""
    return torch.cat([part for kind in zip(*moments, strict=True) for part in kind], 1)


def used(features: Tensor, spread: bool) -> Tensor:
    """Those of the features [n, F] that count: all, or the first half, the means."""
    return features if spread else features[:, : features.shape[1] // 2]


def _space(tasks: Sequence[FeatureStatistics], spread: bool) -> FeatureSpace:
    return FeatureSpace(tasks if spread else [task.part(len(task.mean) // 2) for task in tasks])
