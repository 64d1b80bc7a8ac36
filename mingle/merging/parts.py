"""The parts in which a merge goes from file to file, and which processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from mingle import ranks
from mingle.io.journal import Journal
from mingle.io.lazy_tensors import consecutive


class Part(NamedTuple):
    """Some of what is merged, which is written together.

    Attributes:
        place: in the plan.
        names: of the tensors or layers in it.
    """

    place: int
    names: list[str]


class PartsProgress(NamedTuple):
    """How far a step of a merge from files is.

    Attributes:
        number: of the pass over the model, from 1.
        done: the bytes that this process has finished in it, of those that are to be written or looked at.
        total: all that it has to do.
    """

    number: int
    done: int
    total: int


_told: ContextVar[Callable[[PartsProgress], None] | None] = ContextVar("told of finished parts", default=None)


@contextmanager
def telling(on_part: Callable[[PartsProgress], None]) -> Iterator[None]:
    """Inside the block `on_part` is told of every part that this process finishes."""
    token = _told.set(on_part)
    try:
        yield
    finally:
        _told.reset(token)


class Parts:
    """All parts of a step, planned from sizes alone: the same whoever makes them, and in how many processes.

    Args:
        sizes: the bytes of what is written, by the names of tensors or layers.
        work: what merging one of them costs beside others, in no unit.
        part_bytes: a part is of about so many.
        notes: what an interrupted run of this very step has finished.
    """

    def __init__(
        self, sizes: Mapping[str, int], work: Callable[[str], float], part_bytes: int, notes: Journal
    ) -> None:
        planned = consecutive(sizes, part_bytes)
        self.all = [Part(place, names) for place, names in enumerate(planned)]
        self._sizes, self._work, self._notes = sizes, work, notes

    def left(self, number: int) -> list[Part]:
        """Those that a pass of this number has not finished."""
        finished = self._notes.finished(number)
        return [part for part in self.all if part.place not in finished]

    def mine(self, number: int) -> Iterator[Part]:
        """Those of them that this process is dealt; when the next is asked for, one is finished."""
        left = self.left(number)
        dealt = ranks.dealt([sum(map(self._work, part.names)) for part in left])
        mine = [left[place] for place in dealt[ranks.rank()]]
        sizes = [sum(self._sizes[name] for name in part.names) for part in mine]
        told, done = _told.get(), 0
        for part, size in zip(mine, sizes, strict=True):
            yield part
            done += size
            if told is not None:
                told(PartsProgress(number + 1, done, sum(sizes)))
