"""One model's answers among the classes of all its tasks, where nobody says which task a sample is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    """Answers as numbers.

    Attributes:
        task, label, score: the number of the task, that of the class, and the probability, each [n].
        labels: what the answer would be in every task, [n, T].
    """

    task: Tensor
    label: Tensor
    score: Tensor
    labels: Tensor


class AllTasks:
    """All tasks of one model, and what is needed to tell them apart.

    Args:
        task: the task type.
        method: with the merged model.
        names: of the tasks.
        heads: theirs.
        temperatures: theirs, see `mingle.merging.calibration`.
    """

    def __init__(
        self,
        task: TaskType,
        method: MergeMethod,
        names: Sequence[str],
        heads: Sequence[Head],
        temperatures: Sequence[float | None],
    ) -> None:
        self.task, self.method = task, method
        self.names, self.heads, self.temperatures = names, heads, temperatures

    def hindrance(self) -> str:
        """Why samples cannot be answered among the classes of all tasks; empty where they can."""
        if not self.names:
            return "no task is merged, so there is nothing to choose from"
        if not self.task.one_class:
            return f"the answers of a {self.task.name} model are texts, which its `generate` gives"
        if self.method.per_task:
            return f"method {self.method.name!r} keeps one model per task; use model_for(name)"
        for name, head in zip(self.names, self.heads, strict=True):
            if reason := lacking(self.task, name, head):
                return reason
        own = any(head.tensors or head.shared for head in self.heads)
        if not own and not self.method.routes and len(self.names) > 1:
            return (
                f"the tasks of a {self.task.name} model have nothing of their own to be told apart by: no "
                "heads, and nothing that the samples of a task share"
            )
        return ""

    def predict(self, inputs: TaskData | Mapping[str, Any], batch_size: int) -> Prediction:
        """See `mingle.Merger.predict`."""
        if reason := self.hindrance():
            raise ValueError(f"predict: {reason}")
        model = self.method.model
        choices = [
            self.choose(model, batch, self.method.route(batch))
            for batch in self._samples(inputs).batches(batch_size)
        ]
        tasks, labels, scores, _ = (torch.cat(parts).tolist() for parts in zip(*choices, strict=True))
        return Prediction(
            [self.names[task] for task in tasks],
            [
                label if (known := self.heads[task].labels) is None else known[label]
                for task, label in zip(tasks, labels, strict=True)
            ],
            scores,
        )

    @torch.no_grad()
    def shares(self, model: nn.Module, data: TaskData, routed: Tensor | None) -> list[Tensor]:
        """The probabilities of every task's classes, [n, C] for each task; arguments as for `choose`."""
        scores = [part.float().cpu() for part in self.task.union(model, data, self.heads)]
        one_scale = self.task.one_scale and routed is None
        return probabilities(scores, self.temperatures, one_scale=one_scale)

    def choose(self, model: nn.Module, data: TaskData, routed: Tensor | None) -> Choice:
        """The likeliest answers to samples.

        Args:
            model: the merged model.
            data: the samples.
            routed: the numbers of their tasks [n], as the method's `route` gives them; None where it has no
                router.
        """
        shares = [part.max(1) for part in self.shares(model, data, routed)]
        best, labels = (torch.stack(parts, 1) for parts in zip(*shares, strict=True))  # [n, T]
        chosen = (best.argmax(1) if routed is None else routed.cpu()).unsqueeze(1)
        answers = (chosen, labels.gather(1, chosen), best.gather(1, chosen))
        task, label, score = (part.squeeze(1) for part in answers)
        return Choice(task, label, score, labels)

    def _samples(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples without labels, with something in the place of what those of a task share."""
        shared = self.heads[0].shared
        if isinstance(given, TaskData):
            return self.task.samples(
                self.method.model, replace(given, shared=shared, labels=None, class_names=None)
            )
        dropped = ("labels", "class_names", *shared)
        kept = {name: part for name, part in given.items() if name not in dropped}
        return self.task.samples(self.method.model, {**kept, **shared})


def lacking(task: TaskType, name: str, head: Head) -> str:
    """Why the classes of a merged task are not known; empty where they are."""
    unknown = [key for key in task.shared if key not in head.shared]
    if not unknown:
        return ""
    return (
        f"task {name!r} was merged without samples, so its {unknown[0]} are not known; give them "
        f"by set_classes({name!r}, shared={{{unknown[0]!r}: …}})"
    )
