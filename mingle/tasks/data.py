"""Samples of one task, as tensors or made batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

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
        metric: what is measured on them: ``accuracy``, or another that the task type knows; see
            `mingle.merging.evaluate.score`.
        decode: tokens [n, L] → n texts, for a metric that reads the answers as text.
        class_names: the names of the classes by number, where they are known.
    """

    inputs: Mapping[str, torch.Tensor]
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    labels: torch.Tensor | None = None
    metric: str = "accuracy"
    decode: Callable[[torch.Tensor], list[str]] | None = None
    class_names: tuple[str, ...] | None = None

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
        """The same samples, in memory, on a device."""
        inputs, shared = (
            {name: tensor.to(device) for name, tensor in part.items()}
            for part in (self.made().inputs, self.shared)
        )
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, inputs=inputs, shared=shared, labels=labels)

    def batches(self, size: int, own: slice = slice(None)) -> Iterator[TaskData]:
        """Consecutive batches of at most `size` samples in memory, in order; of all only those in `own`."""
        for start in range(0, len(self), size)[own]:
            yield self.select(slice(start, start + size)).made()

    def batches_by_length(self, size: int, own: slice = slice(None)) -> Iterator[TaskData]:
        """Batches of at most `size` samples, in any order, for sums that do not depend on it.

        Of all these batches only those of the numbers in `own` are made.

        Of texts, those of about the same length come together, without the columns at the right end that only
        pad them: half the tokens of short texts are padding otherwise.  Everything else comes in order.
        """
        mask = None if isinstance(self.inputs, LazyInputs) else self.inputs.get("attention_mask")
        if mask is None or (self.labels is not None and self.labels.dim() > 1):
            yield from self.batches(size, own)
            return
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        ends = (mask.bool() * places).amax(1)  # [n], where the last token that counts ends
        for index in ends.argsort(stable=True).split(size)[own]:
            batch, end = self.select(index), max(int(ends[index].amax()), 1)
            columns = {
                name: tensor[:, :end] if tensor.shape[1:] == mask.shape[1:] else tensor
                for name, tensor in batch.inputs.items()
            }
            yield replace(batch, inputs=columns)


def class_names_of(given: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The ``class_names`` of samples, None where there are none.

    Raises:
        ValueError: anything but a list of texts.
    """
    names = given.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"class_names: {shown(names)}: expected a list of texts, one for each class")
    return tuple(names)
