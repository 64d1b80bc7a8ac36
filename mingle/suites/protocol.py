"""Where seed samples come from: the two protocols, whose numbers must never be mixed.

``official``, as in the published code: the same number of samples of every class, picked with the labels of
the test set and left in it; gates see the mean of a batch.

``strict``: as many samples in total, drawn without looking at labels and taken out of the test set; gates see
the mean of a sample, so predictions do not depend on what shares a batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mingle.tasks import TaskData

#: protocol → what its gates see
PROTOCOLS = {"strict": "sample", "official": "batch"}


@dataclass(frozen=True)
class SeedRequest:
    """How to choose seed samples.

    Attributes:
        protocol: one of `PROTOCOLS`.
        samples_per_class: times the number of classes gives the number of seed samples.
        seed: of the choice.
        total: the number of seed samples where there are no classes, as in tasks that are answered in words;
            at most half of the samples are taken.
    """

    protocol: str = "strict"
    samples_per_class: int = 5
    seed: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Labels:
    """The labels of a task's samples, known without making the samples.

    Attributes:
        numbers: class numbers, int64 [n]; where there are no classes, any tensor with one row per sample.
        names: the classes' names by number; None where there are no classes, or they have no names.
    """

    numbers: torch.Tensor
    names: Sequence[str] | None = None


def check_labels(name: str, labels: Labels, request: SeedRequest) -> str:
    """Count the samples of a task that a request for seeds is about.

    Returns:
        Under ``official``, which classes have fewer samples than were asked for, and how many: their share of
        the seeds is smaller.  Empty where none has.

    Raises:
        ValueError: labels that are not classes; under ``strict``, too few samples to leave any for the test.
    """
    numbers, names = labels.numbers, labels.names
    if names is not None and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(names):
        found = f"{int(numbers.min())} to {int(numbers.max())}"
        raise ValueError(f"task {name!r}: labels from {found}, and there are {len(names)} classes, from 0 on")
    if request.protocol == "strict":
        _require_rest(name, len(numbers), _seeds(numbers, request))
    elif request.total is None:
        each = request.samples_per_class
        counts = torch.bincount(numbers, minlength=len(names or ()))
        few = {
            str(row if names is None else names[row]): count
            for row, count in enumerate(counts.tolist())
            if count < each
        }
        if few:
            listed = ", ".join(f"{found!r} has {count}" for found, count in few.items())
            return f"fewer than {each} samples of a class: {listed}"
    return ""


def split(name: str, samples: TaskData, request: SeedRequest) -> tuple[TaskData, TaskData]:
    """One task's seed samples, without labels, and its test samples, with labels.

    Raises:
        ValueError: no labels, or too few samples to leave any for the test.
    """
    if samples.labels is None:
        raise ValueError(f"task {name!r}: a suite's samples need labels")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/seeds/{request.seed}".encode()))
    order = torch.randperm(len(samples), generator=generator)
    seeds = _seeds(samples.labels, request)
    test = samples
    if request.protocol == "strict":
        _require_rest(name, len(samples), seeds)
        chosen = order[:seeds]
        test = samples.select(order[seeds:].sort().values)
    elif request.total is not None:
        chosen = order[:seeds]
    else:
        shuffled = samples.labels[order]
        chosen = torch.cat(
            [
                order[(shuffled == label).nonzero().flatten()[: request.samples_per_class]]
                for label in range(int(samples.labels.max()) + 1)
            ]
        )
    return replace(samples.select(chosen).made(), labels=None), test


def tested(labels: torch.Tensor, request: SeedRequest) -> int:
    """How many of a task's samples, with these labels, are for the test."""
    return len(labels) - (_seeds(labels, request) if request.protocol == "strict" else 0)


def _seeds(labels: torch.Tensor, request: SeedRequest) -> int:
    """How many seed samples are asked for."""
    if request.total is not None:
        return min(request.total, max(1, len(labels) // 2))
    return request.samples_per_class * (int(labels.max()) + 1)


def _require_rest(name: str, samples: int, seeds: int) -> None:
    if seeds >= samples:
        raise ValueError(
            f"task {name!r}: {seeds} seed samples are needed of the {samples} that there are; none would be "
            "left for the test"
        )
