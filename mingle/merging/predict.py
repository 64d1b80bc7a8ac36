"""One model's answers among the classes of all its tasks, where nobody says which task a sample is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.merging.calibration import probabilities
from mingle.methods import MergeMethod
from mingle.tasks import TaskData, TaskType
from mingle.tasks.heads import Head


@dataclass(frozen=True)
class Prediction:
    """Answers to samples, one entry for each.

    Attributes:
        task: the names of the tasks that the samples were found to be of.
        label: the class in that task: its name, or its number where names are not known.
        score: the probability of the answer, see `mingle.merging.calibration`; where a router found the task,
            among the classes of that task.
    """

    task: list[str]
    label: list[str | int]
    score: list[float]

    def __len__(self) -> int:
        return len(self.task)


class Choice(NamedTuple):
    """Answers as numbers, each [n]: the task's, the class's, and the probability."""

    task: Tensor
    label: Tensor
    score: Tensor


class Union:
    """All tasks of one model, and what is needed to tell them apart.

    Args:
        task: the task type.
        method: with the merged model.
        heads: of the tasks.
        temperatures: of the tasks, see `mingle.merging.calibration`.
    """

    def __init__(
        self,
        task: TaskType,
        method: MergeMethod,
        heads: Sequence[Head],
        temperatures: Sequence[float | None],
    ) -> None:
        self.task, self.method, self.heads = task, method, heads
        self.temperatures = temperatures

    @torch.no_grad()
    def choose(self, model: nn.Module, data: TaskData, routed: Tensor | None) -> Choice:
        """The likeliest answers to samples.

        Args:
            model: the merged model.
            data: the samples.
            routed: the numbers of their tasks [n], as the method's `route` gives them; None where it has no
                router.
        """
        scores = [part.float().cpu() for part in self.task.union(model, data, self.heads)]
        one_scale = self.task.one_scale and routed is None
        shares = probabilities(scores, self.temperatures, one_scale=one_scale)
        best, labels = (
            torch.stack(parts, 1) for parts in zip(*(part.max(1) for part in shares), strict=True)
        )  # [n, T]
        chosen = (best.argmax(1) if routed is None else routed.cpu()).unsqueeze(1)
        return Choice(
            chosen.squeeze(1), labels.gather(1, chosen).squeeze(1), best.gather(1, chosen).squeeze(1)
        )
