"""The texts of the text suites, as ``examples/text_data/build.py`` gathers them from free sources.

``data/manifest.json`` says which versions of which sources they come from, and ``data/LICENSES.txt`` under
which licences they may be passed on.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

DATA = Path(__file__).parent / "data"
TEXTS = DATA / "texts.json.xz"


@dataclass(frozen=True)
class TextTask:
    """Tell the classes of short English texts apart.

    Attributes:
        name: of the task.
        class_names: C names, which the base's embeddings of them stand for.
        train, test: the texts of every class; no text is in both, capitals and accents aside.
    """

    name: str
    class_names: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the classes and the training texts."""
        content = json.dumps([self.class_names, self.train])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def labelled(texts: tuple[tuple[str, ...], ...]) -> tuple[list[str], torch.Tensor]:
    """The texts of all classes in one list of n, and their labels int64 [n]."""
    labels = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(own) for own in texts]))
    return [text for own in texts for text in own], labels


@cache
def read_tasks(suite: str) -> dict[str, TextTask]:
    """The tasks of ``texts8``, or of ``texts-tuning``, which has other classes of other texts; by name."""
    found = json.loads(lzma.decompress(TEXTS.read_bytes()))[suite]
    return {
        name: TextTask(
            name,
            tuple(task["classes"]),
            *(tuple(tuple(texts) for texts in task[part]) for part in ("train", "test")),
        )
        for name, task in found.items()
    }
