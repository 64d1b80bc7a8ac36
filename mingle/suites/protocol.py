"""Where seed samples come from: the two protocols, whose numbers must never be mixed.

``official``, as in the published code: the same number of samples of every class, picked with the labels of
the test set and left in it; gates see the mean of a batch.

``strict``: as many samples in total, drawn without looking at labels and taken out of the test set; gates see
the mean of a sample, so predictions do not depend on what shares a batch.
"""

from __future__ import annotations

import logging
import zlib
from dataclasses import dataclass, replace

import torch

from mingle.tasks import TaskData

logger = logging.getLogger(__name__)

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


def split(name: str, samples: TaskData, request: SeedRequest) -> tuple[TaskData, TaskData]:
    """One task's seed samples, without labels, and its test samples, with labels.

    Raises:
        ValueError: no labels, or too few samples to leave any for the test.
    """
    if samples.labels is None:
        raise ValueError(f"task {name!r}: a suite's samples need labels")
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/seeds/{request.seed}".encode()))
    order = torch.randperm(len(samples), generator=generator)
    classes = int(samples.labels.max()) + 1
    total = None if request.total is None else min(request.total, len(samples) // 2)
    test = samples
    if request.protocol == "strict":
        chosen = order[: total or request.samples_per_class * classes]
        rest = order[len(chosen) :].sort().values
        if not len(rest):
            raise ValueError(
                f"task {name!r}: all {len(samples)} samples are needed as seed samples; "
                "none would be left for the test"
            )
        test = samples.select(rest)
    elif total is not None:
        chosen = order[:total]
    else:
        shuffled = samples.labels[order]
        chosen = torch.cat(
            [
                order[(shuffled == label).nonzero().flatten()[: request.samples_per_class]]
                for label in range(classes)
            ]
        )
        counts = torch.bincount(samples.labels[chosen], minlength=classes)
        short = (counts < request.samples_per_class).nonzero().flatten().tolist()
        if short:
            logger.warning(
                "task %s: fewer than %d samples of classes %s", name, request.samples_per_class, short
            )
    return replace(samples.select(chosen).made(), labels=None), test
