"""What the samples of a task were taken for: of which task, and of which of its own classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

#: how many pairs of classes are kept of each task
_MOST = 5


@dataclass(frozen=True)
class Confusion:
    """Two classes of one task that were mixed up.

    Attributes:
        wanted, given: the right class and the answer: their names, or their numbers where these are unknown.
        count: how many samples of the right class got this answer.
        samples: how many samples of the right class there are.
    """

    wanted: str
    given: str
    count: int
    samples: int


@dataclass(frozen=True)
class Answers:
    """The answers to the samples of one task, counted.

    Attributes:
        taken: name of a task → how many samples were taken as samples of it, where nobody says which task
            they are of.
        confused: the classes most often mixed up where the task is known, the worst first.
    """

    taken: dict[str, int] = field(default_factory=dict)
    confused: list[Confusion] = field(default_factory=list)

    @classmethod
    def of(
        cls, names: Sequence[str], found: Tensor, wanted: Tensor, given: Tensor, labels: Sequence[str] | None
    ) -> Answers:
        """Count answers.

        Args:
            names: of the tasks.
            found: the numbers of the tasks that the samples were found to be of, [n].
            wanted, given: the right classes and the answers where the task is known, [n].
            labels: the names of the classes by number, where they are known.
        """
        counts = torch.bincount(found, minlength=len(names)).tolist()
        pairs, sizes = torch.unique(
            torch.stack([wanted, given])[:, wanted != given], dim=1, return_counts=True
        )
        worst = sizes.argsort(descending=True, stable=True)[:_MOST]
        confused = [
            Confusion(_name(labels, right), _name(labels, answer), count, int((wanted == right).sum()))
            for (right, answer), count in zip(pairs[:, worst].T.tolist(), sizes[worst].tolist(), strict=True)
        ]
        return cls(dict(zip(names, counts, strict=True)), confused)

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> Answers:
        """The answers of which a file says this, in the form of `mingle.io.manifest.ANSWERS`."""
        return cls(dict(noted["taken"]), [Confusion(**each) for each in noted["confused"]])

    def noted(self) -> dict[str, Any]:
        """What a file says of them."""
        return asdict(self)


def _name(labels: Sequence[str] | None, number: int) -> str:
    return str(number) if labels is None or number >= len(labels) else labels[number]
