"""The samples that each step of an adaptation sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.tasks import TaskData, TaskType
from mingle.tasks.shares import pools_over_batches


class Share(NamedTuple):
    """What passes through the model at once of a step's batch.

    Attributes:
        samples: which ones, as positions; one that does not count where there is none.
        weight: how much their mean loss counts in that of the batch.
    """

    samples: Tensor
    weight: float


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches [size] that pass through all `count` samples in a new random order each time."""
    queue = torch.empty(0, dtype=torch.long)
    size = min(size, count)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def drawn(count: int, size: int, steps: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """The samples that any step uses, rising [m], and every step's batch as positions among them."""
    batches = list(islice(shuffled_batches(count, size, generator), steps))
    used = torch.cat(batches).unique()
    return used, [torch.searchsorted(used, batch) for batch in batches]


class Shares(NamedTuple):
    """The batches of all steps, and what one process takes of them.

    Attributes:
        samples: all that any step uses.
        own: those that this process uses; one at least, to try the model on.
        taken: what it takes of every batch, pass by pass, as positions among its own.
    """

    samples: TaskData
    own: TaskData
    taken: list[list[Share]]


def shared(
    task: TaskType,
    model: nn.Module,
    seeds: TaskData,
    size: int,
    steps: int,
    generator: torch.Generator,
    at_once: int | None = None,
) -> Shares:
    """Draw the batches, the same in every process, and share them out.

    Args:
        task: knows which places of the answers count.
        model: the samples' own; where its gates pool over batches, the first process takes them whole.
        seeds: the same in every process.
        size: samples per batch.
        steps: how many batches.
        generator: in the same state in every process.
        at_once: how many samples pass through the model at once; None for all of a process's share.
    """
    if steps == 0:
        return Shares(seeds, seeds, [])
    used, batches = drawn(len(seeds), size, steps, generator)
    samples = _selected(seeds, used)
    valid = task.valid(samples)
    counts = torch.ones(len(used)) if valid is None else valid.sum(1).cpu()
    places, taken = own_shares(batches, counts, whole=pools_over_batches(model), at_once=at_once)
    return Shares(samples, _selected(samples, places), taken)


def own_shares(
    batches: Sequence[Tensor], counts: Tensor, *, whole: bool = False, at_once: int | None = None
) -> tuple[Tensor, list[list[Share]]]:
    """This process's samples, rising [m], and what it takes of every batch, as positions among them.

    A batch is shared in the order of its samples' numbers, so that a process meets the same ones again and
    again.  All processes take it in equally many passes.  One without a share of any batch still has a
    sample, to try the model on.

    Args:
        batches: the samples of every step, as many in each, the same in all processes.
        counts: how many numbers the loss is a mean over, for every sample [n].
        whole: whether the first process takes whole batches, as it has to where gates pool over them.
        at_once: how many samples pass through the model at once; None for all of a share.
    """
    own = []
    for batch in batches:
        if whole:
            own.append(batch if ranks.rank() == 0 else batch[:0])
            continue
        mine = torch.zeros(len(batch), dtype=torch.bool)
        mine[batch.argsort(stable=True)[ranks.shared(len(batch))]] = True
        own.append(batch[mine])
    used = torch.cat(own).unique()
    if not len(used):
        used = batches[0][:1]
    most = len(batches[0]) if whole else -(-len(batches[0]) // ranks.size())
    passes = -(-most // (at_once or most))

    def share(part: Tensor, batch: Tensor) -> Share:
        if not len(part):
            return Share(torch.zeros(1, dtype=torch.long), 0.0)
        return Share(torch.searchsorted(used, part), float(counts[part].sum() / counts[batch].sum()))

    return used, [
        [share(part, batch) for part in mine.tensor_split(passes)]
        for mine, batch in zip(own, batches, strict=True)
    ]


def _selected(data: TaskData, index: Tensor) -> TaskData:
    """The samples at a rising `index`."""
    return data if len(index) == len(data) else data.select(index)
