"""Accuracy after every merge, and the two numbers of continual learning: ACC and BWT."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mingle.kernels import reference
from mingle.layers import MingleLinear
from mingle.tasks import TaskData, TaskType


@dataclass(frozen=True)
class Result:
    """Accuracies in per cent.

    Attributes:
        tasks: names in order of arrival.
        matrix: matrix[i][j] is the accuracy on task j after merging task i; None where it was not measured and above the diagonal.
    """

    tasks: list[str]
    matrix: list[list[float | None]]

    @property
    def acc(self) -> float:
        """Mean accuracy over all tasks after the last merge; NaN where that was not measured."""
        return _mean(self.matrix[-1] if self.matrix else [])

    @property
    def bwt(self) -> float:
        """Backward transfer: the mean over earlier tasks of a[T][j] − a[j][j].  0 for one task, NaN where rows are missing."""
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
    """Per cent of the samples the model answers rightly, in order and in batches of `batch_size`."""
    model.eval()
    right = [task.correct(task.logits(model, batch), batch) for batch in data.batches(batch_size)]
    return 100 * torch.cat(right).double().mean().item()


@torch.no_grad()
def gate_activation(
    task: TaskType, model: nn.Module, layers: Mapping[str, MingleLinear], data: TaskData, batch_size: int = 128
) -> torch.Tensor:
    """The mean gate value of every expert in every layer over the samples: [L, T]."""
    sums = [torch.zeros(layer.num_experts) for layer in layers.values()]

    def hook(i: int) -> Callable[..., None]:
        def observe(layer: MingleLinear, args: tuple[Any, ...]) -> None:
            values = reference.gate_values(args[0], *layer.all_gates(), layer.reduce)
            sums[i] += values.flatten(0, -2).mean(0).cpu() * len(args[0])

        return observe

    handles = [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers.values())]
    try:
        for batch in data.batches(batch_size):
            task.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(sums) / max(len(data), 1)
