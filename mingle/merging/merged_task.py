"""A task that a merged model serves, or served: what is noted of it, and what it has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mingle.io.hub import ModelName
from mingle.io.lazy_tensors import chosen
from mingle.methods.base import Tensors
from mingle.tasks import TaskData, TaskType
from mingle.tasks.heads import Head

#: before the names of what a task has of its own, in its file: a head's tensors, and what its samples share
_HEAD, _SHARED = "head/", "shared/"
_NOTED = ("name", "seed_samples", "skipped", "notes", "labels", "temperature")


@dataclass
class MergedTask:
    """One task that the merged model serves.

    Attributes:
        name: the task's name.
        seed_samples: how many seed samples it was merged with.
        skipped: why nothing was merged, or None.
        notes: things worth telling, such as a saturated basis.
        labels: the names of its classes by number, None where they are not known.
        temperature: what makes its head's scores probabilities, see `mingle.merging.calibration`; None where
            it was not measured.
        model: what its fine-tuned model is called.
        tensors: what it has of its own, such as a classifier's head, by names in the model.
        shared: what its samples share, such as the embeddings of its classes.
    """

    name: str
    seed_samples: int = 0
    skipped: str | None = None
    notes: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    temperature: float | None = None
    model: ModelName = field(default_factory=ModelName)
    tensors: Tensors = field(default_factory=dict, compare=False)
    shared: Tensors = field(default_factory=dict, compare=False)

    @property
    def head(self) -> Head:
        """What the task answers with, beside the model that is merged."""
        return Head(self.tensors, self.shared, self.labels)

    def noted(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {key: getattr(self, key) for key in _NOTED} | {"model": self.model._asdict()}

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> MergedTask:
        """The task of which a manifest says this; its tensors are yet to be taken."""
        known = {key: noted[key] for key in _NOTED if key in noted}
        return cls(**known, model=ModelName.noted(noted.get("model", {})))

    def kept(self) -> Tensors:
        """What it has of its own, as it is saved."""
        head = {f"{_HEAD}{name}": tensor for name, tensor in self.tensors.items()}
        return head | {f"{_SHARED}{name}": tensor for name, tensor in self.shared.items()}

    def take(self, saved: Mapping[str, Tensor], task: TaskType, base: nn.Module) -> Mapping[str, Tensor]:
        """Take what the task has of its own out of what was saved of it; the rest is the method's.

        Raises:
            ValueError: a head that this base cannot have.
        """
        own, self.shared = (
            {name.removeprefix(kind): saved[name] for name in saved if name.startswith(kind)}
            for kind in (_HEAD, _SHARED)
        )
        expected = task.heads(base)
        if own.keys() != set(expected):
            raise ValueError(f"task {self.name!r}: expected a head of {', '.join(expected) or 'nothing'}")
        self.tensors = {name: own[name] for name in expected}  # in the model's order
        task.check_head(self.head)
        return chosen(saved, [name for name in saved if not is_own(name)])


@dataclass
class RemovedTask:
    """A task that left, where something of it is still in what others have.

    Attributes:
        name: the task's name.
        stays: what is, in words.
        tasks: the names of those others.
    """

    name: str
    stays: list[str]
    tasks: list[str]

    @classmethod
    def of(cls, noted: Mapping[str, Any]) -> RemovedTask:
        """The one that a manifest says this of."""
        return cls(noted["name"], list(noted["stays"]), list(noted["tasks"]))


def is_own(name: str) -> bool:
    """Whether a tensor that is saved of a task, by its name there, is not the method's."""
    return name.startswith((_HEAD, _SHARED))


def own_head(head: Tensors, samples: TaskData | None, labels: Sequence[str] | None) -> Head:
    """What a new task has of its own; the names of classes that come with samples go before its model's.

    Args:
        head: the tensors of the fine-tuned model's head.
        samples: the task's seed samples.
        labels: the names of classes in the fine-tuned model's configuration.
    """
    if samples is None:
        return Head(head, {}, labels)
    shared: dict[str, Tensor] = {name: part.detach().clone() for name, part in samples.shared.items()}
    return Head(head, shared, labels if samples.class_names is None else samples.class_names)
