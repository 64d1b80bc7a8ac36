"""One model's answers among the classes of all its tasks, where nobody says which task a sample is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.merging.calibration import joint
from mingle.methods import MergeMethod
from mingle.tasks import TaskData, TaskType
from mingle.tasks.heads import Head


@dataclass(frozen=True)
class Prediction:
    """Answers to samples, one entry for each.

    Attributes:
        task: the names of the tasks that the samples were found to be of.
        label: the class in that task: its name, or its number where names are not known.
        score: the probability of the answer.  Where a router found the task, it is that of the class among
            the task's own; else that of the class among those of all tasks.
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
        calibrations: see `calibration`; None for a task without.
    """

    def __init__(
        self,
        task: TaskType,
        method: MergeMethod,
        heads: Sequence[Head],
        calibrations: Sequence[Sequence[float] | None],
    ) -> None:
        self.task, self.method, self.heads = task, method, heads
        self.calibrations = calibrations

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
        labels = torch.stack([part.argmax(1) for part in scores], 1)  # [n, T]
        if routed is None:
            shares = torch.stack(list(joint(scores, self.calibrations)), 1)
            best, chosen = shares.max(1)
        else:
            shares = torch.stack([part.softmax(1).amax(1) for part in scores], 1)
            chosen = routed.cpu()
            best = shares.gather(1, chosen.unsqueeze(1)).squeeze(1)
        return Choice(chosen, labels.gather(1, chosen.unsqueeze(1)).squeeze(1), best)
