"""Task types: how a batch becomes logits, and what counts as right.

The only code that knows about modalities is in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mingle.io.files import CheckpointError
from mingle.options import shown
from mingle.tasks.lazy import LazyInputs


@dataclass(frozen=True)
class TaskData:
    """Samples of one task.

    Attributes:
        inputs: tensors with one row per sample, by the model's own argument names; `LazyInputs` makes them
            batch by batch.
        shared: tensors that all samples share, such as the text embeddings of the classes.
        labels: targets [n], or tokens of answers [n, L], or None where there are none; adaptation never reads
            them.
        metric: what is measured on them, ``accuracy`` or ``spearman``.
        decode: tokens [n, L] → n texts, for a metric that reads the answers as text.
    """

    inputs: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    metric: str = "accuracy"
    decode: Callable[[torch.Tensor], list[str]] | None = None

    def __len__(self) -> int:
        return len(
            self.inputs.rows if isinstance(self.inputs, LazyInputs) else next(iter(self.inputs.values()))
        )

    def select(self, index: torch.Tensor | slice) -> TaskData:
        """The samples at `index`, a slice or an int64 tensor."""
        labels = None if self.labels is None else self.labels[index]
        if isinstance(self.inputs, LazyInputs):
            return replace(self, inputs=self.inputs.select(index), labels=labels)
        return replace(
            self, inputs={name: tensor[index] for name, tensor in self.inputs.items()}, labels=labels
        )

    def made(self) -> TaskData:
        """The same samples with all their inputs in memory."""
        return replace(self, inputs=self.inputs.made()) if isinstance(self.inputs, LazyInputs) else self

    def to(self, device: torch.device) -> TaskData:
        """The same samples, in memory, on a device; labels stay where they are."""
        inputs, shared = (
            {name: tensor.to(device) for name, tensor in part.items()}
            for part in (self.made().inputs, self.shared)
        )
        return replace(self, inputs=inputs, shared=shared)

    def batches(self, size: int) -> Iterator[TaskData]:
        """Consecutive batches of at most `size` samples in memory, in order."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size)).made()


class TaskType(Protocol):
    """What merging needs to know about a kind of model."""

    name: str
    #: the sub-module that fine-tuning changed, as a dotted name
    tower: str
    #: what a fine-tuned checkpoint may put before the tower's own parameter names
    prefixes: tuple[str, ...]
    #: the name of the tower's configuration in the model's; empty where the tower is the whole model
    config_part: str
    #: named sets of target layers, as exact suffixes; a set may cover several variants of the architecture:
    #: only the suffixes that a model has count
    layer_sets: Mapping[str, tuple[str, ...]]
    #: the transformer blocks that every input passes through first, as a dotted name inside the tower
    blocks: str

    def skeleton(self, folder: str | Path) -> nn.Module:
        """The model a folder describes, on the meta device, its checkpoint checked against it."""

    def load(self, folder: str | Path) -> nn.Module:
        """A base model from a local folder in hub format."""

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Checked samples of this task type."""

    def reduce_for(self, layer: str, reduce: str) -> str:
        """The reduction of the gates of a layer of the tower, where `reduce` is asked for."""

    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """Seed samples completed by what only the fine-tuned model can tell, such as its own answers.

        Nothing is taken from labels.
        """

    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        """Class scores of a batch, [n, C], or [n, L, C] with one row per position of the answers."""

    def valid(self, data: TaskData) -> torch.Tensor | None:
        """Which positions of the answers count, bool [n, L]; None where an answer has one."""

    def outcomes(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        """The result for each sample: 1 or 0, right or wrong, [n]; or numbers given and wanted, [n, 2].

        See `mingle.merging.evaluate.score`.
        """


def get(name: str) -> TaskType:
    """The task type of that name.

    Raises:
        ValueError: an unknown name.
    """
    from mingle.tasks.clip import ClipTask
    from mingle.tasks.t5 import T5Task

    known: dict[str, TaskType] = {task.name: task for task in (ClipTask(), T5Task())}
    if name not in known:
        raise ValueError(f"unknown task type {shown(name)}: expected one of {', '.join(known)}")
    return known[name]


def of(model: nn.Module | str | Path) -> TaskType:
    """The task type of a base model, a module or a local folder, by its configuration.

    Raises:
        CheckpointError: a folder without a readable configuration, or with one of an unknown kind of model.
        ValueError: a module of an unknown kind.
    """
    from mingle.tasks.loading import model_type

    if isinstance(model, nn.Module):
        return get(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    found = model_type(model)
    try:
        return get(found)
    except ValueError as error:
        raise CheckpointError(f"{Path(model) / 'config.json'}: {error}") from None
