"""Accuracy after every merge, and the two numbers of continual learning: ACC and BWT."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from mingle.merging.answers import Answers
from mingle.merging.predict import AllTasks, Choice
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import observed
from mingle.nn.replay import replayed
from mingle.tasks import TaskData, TaskType
from mingle.tasks.base import required_labels
from mingle.tasks.heads import common_part
from mingle.tasks.shares import by_batches


@dataclass(frozen=True)
class Result:
    """Accuracies in per cent.

    Attributes:
        tasks: the tasks' names in order of arrival.
        matrix: ``matrix[i][j]``, j ≤ i, is the accuracy on task j after merging task i, where it is known
            that samples are of task j; None where it was not measured.
        unknown: the same where that is not known: a sample counts if task and class are both right.  None
            also where this has no meaning, as for answers in words.
        answers: by task, what its samples were taken for when they were last measured; only of tasks of which
            `unknown` was measured.
    """

    tasks: list[str]
    matrix: list[list[float | None]]
    unknown: list[list[float | None]] = field(default_factory=list)
    answers: dict[str, Answers] = field(default_factory=dict)

    @property
    def acc(self) -> float:
        """Mean accuracy over all tasks after the last merge; NaN where one was not measured."""
        return _mean(self.matrix[-1] if self.matrix else [])

    @property
    def acc_unknown(self) -> float:
        """The same mean where nobody says which task a sample is of; NaN where one was not measured."""
        return _mean(self.unknown[-1] if self.unknown else [])

    @property
    def bwt(self) -> float:
        """Backward transfer, in points: the mean over earlier tasks of ``a[T][j] − a[j][j]``.

        0 for one task, NaN where a value is missing.
        """
        if len(self.matrix) == 1:
            return 0.0
        last = self.matrix[-1] if self.matrix else []
        now, then = last[:-1], [row[j] for j, row in enumerate(self.matrix[:-1])]
        return _mean([None if a is None or b is None else a - b for a, b in zip(now, then, strict=True)])


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else float("nan")


@torch.no_grad()
def accuracy(task: TaskType, model: nn.Module, data: TaskData, batch_size: int = 128) -> float:
    """The score of the model on the samples, taken in batches of `batch_size`; see `score`.

    Of several processes each takes some of the batches, and all have the score of a single one.
    """
    model.eval()
    outcomes = by_batches(data, batch_size, lambda batch: task.outcomes(model, batch).cpu())
    return score(torch.cat(outcomes), data.metric)


@torch.no_grad()
def accuracies(
    tasks: AllTasks, place: int, model: nn.Module, data: TaskData, batch_size: int = 128
) -> tuple[float, float, Answers]:
    """The score of the model on samples of a task, where the task is known and where it has to be found.

    The third is what the samples were taken for.

    The part of the model that is common to all tasks computes once for both.  Processes share the batches, as
    in `accuracy`.

    Args:
        tasks: all of the model's.
        place: the number of the task; its head is in the model.
        model: the merged model.
        data: labelled samples, whose metric is the accuracy.
        batch_size: samples per batch.
    """
    model.eval()
    task, head = tasks.task, tasks.heads[place]
    part = common_part(model, task.tower(model), head.tensors)

    def answered(batch: TaskData) -> tuple[torch.Tensor, torch.Tensor, Choice]:
        routed = tasks.method.route(batch)
        with replayed(model, part) as replay:
            outcomes = task.outcomes(model, batch).cpu()
            replay.again()
            return required_labels(batch).cpu(), outcomes, tasks.choose(model, batch, routed)

    labels, known, choices = zip(*by_batches(data, batch_size, answered), strict=True)
    wanted = torch.cat(labels)  # in the order of the answers, which is not that of the samples
    found, label, _, given = (torch.cat(parts) for parts in zip(*choices, strict=True))
    unknown = score((found == place) & (label == wanted), data.metric)
    answers = Answers.of(tasks.names, found, wanted, given[:, place], head.labels)
    return score(torch.cat(known), data.metric), unknown, answers


def score(outcomes: torch.Tensor, metric: str) -> float:
    """The score in per cent of outcomes, as a task type's `outcomes` returns them; more is always better.

    Args:
        outcomes: [n] for ``accuracy`` and ``accuracy-per-token``, which are their mean; [n, 2] for
            ``spearman``, which is the rank correlation of the columns, and for ``perplexity``, whose columns
            are log-likelihoods in nats and numbers of tokens.
        metric: one of these.  Of a perplexity P the score is 100 / P, the (geometric) mean probability of a
            token in per cent: so less forgetting is a larger BWT, and ACC is a mean of things of one kind.

    Raises:
        ValueError: an unknown metric.
    """
    outcomes = outcomes.double()
    if metric in ("accuracy", "accuracy-per-token"):
        return 100 * outcomes.mean().item()
    if metric == "perplexity":
        return 100 * math.exp((outcomes[:, 0].sum() / outcomes[:, 1].sum()).item())
    if metric == "spearman":
        return 100 * spearman(*outcomes.unbind(1))
    raise ValueError(f"metric={metric!r}: expected accuracy, accuracy-per-token, spearman or perplexity")


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's rank correlation of x [n] and y [n]; 0 where one of them never varies.

    Equal values share their mean rank.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, float64 [n]."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[inverse].double()


@torch.no_grad()
def gate_activation(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    data: TaskData,
    batch_size: int = 128,
) -> torch.Tensor:
    """The mean gate value of every expert in every layer over the samples: [L, T]."""
    sums = {name: torch.zeros(layer.num_experts) for name, layer in layers.items()}
    rows = dict.fromkeys(layers, 0)  # one or more for each sample

    def collect(name: str, layer: MingleLinear, x: torch.Tensor) -> None:
        mask = layer.counted(x)
        values = layer.gates(x)
        counted = mask if mask is not None and layer.reduce == "token" else x.new_ones(values.shape[:-1])
        weight = counted / counted.sum() * len(x)
        sums[name] += (values * weight.unsqueeze(-1)).flatten(0, -2).sum(0).cpu()
        rows[name] += len(x)

    with observed(layers, collect):
        for batch in data.batches_by_length(batch_size):
            task.logits(model, batch)
    return torch.stack([total / max(rows[name], 1) for name, total in sums.items()])
