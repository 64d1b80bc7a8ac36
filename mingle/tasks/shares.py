"""What one process of several does of work that goes sample by sample; alone it does all.

All processes have the same samples, and each looks at some of them; see `mingle.ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TypeVar

from torch import nn

from mingle import ranks
from mingle.nn.linear import MingleLinear
from mingle.tasks.data import TaskData

T = TypeVar("T")


def own_batches(model: nn.Module, data: TaskData, size: int) -> Iterator[TaskData]:
    """This process's samples in batches of at most `size`, in memory.

    Those of all processes, one after another, are all samples in order.  Every process has the same number of
    them but for one, or of whole batches where these matter.

    Args:
        model: what the samples are for.
        data: the same in every process.
        size: samples per batch.
    """
    if pools_over_batches(model):
        numbers = ranks.shared(-(-len(data) // size))
        own = slice(numbers.start * size, numbers.stop * size)
    else:
        own = ranks.shared(len(data))
    yield from data.select(own).batches(size)


def by_batches(data: TaskData, size: int, run: Callable[[TaskData], T]) -> list[T]:
    """What `run` makes of `TaskData.batches_by_length`, whichever process makes it; tensors on the CPU.

    The batches are those of a single process, and dealt in turn, so that all have about equally long texts.
    """
    own = slice(ranks.rank(), None, ranks.size())
    found = ranks.gather([run(batch) for batch in data.batches_by_length(size, own)])
    turns = zip_longest(*([(part,) for part in each] for each in found), fillvalue=())
    return [part for turn in turns for each in turn for part in each]


def of_all(parts: list[T]) -> list[T]:
    """What every process made of its `own_batches`, in order; tensors are to be on the CPU."""
    return [part for each in ranks.gather(parts) for part in each]


def pools_over_batches(model: nn.Module) -> bool:
    """Whether gates depend on which samples share a batch, so that a batch must not be divided."""
    return any(isinstance(module, MingleLinear) and module.reduce == "batch" for module in model.modules())
