"""The parts in which a merge goes from file to file, and which processes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        self._work, self._notes = work, notes

    def left(self, number: int) -> list[Part]:
        """Those that a pass of this number has not finished."""
        finished = self._notes.finished(number)
        return [part for part in self.all if part.place not in finished]

    def mine(self, number: int) -> list[Part]:
        """Those of them that this process is dealt."""
        left = self.left(number)
        dealt = ranks.dealt([sum(map(self._work, part.names)) for part in left])
        return [left[place] for place in dealt[ranks.rank()]]
