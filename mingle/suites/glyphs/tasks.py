"""The glyph tasks and suites: an alphabet seen in a visual domain, and lists of those."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from mingle.suites.glyphs.alphabets import ALPHABETS, CELL_ALPHABETS, class_name
from mingle.suites.glyphs.domains import apply_domain
from mingle.suites.glyphs.render import (
    TEST_FACES,
    TEST_PLACEMENT,
    TRAIN_FACES,
    TRAIN_PLACEMENT,
    Placement,
    faces_with,
    outline,
    view,
)


@dataclass(frozen=True)
class GlyphTask:
    """Recognise the characters of one alphabet in one visual domain."""

    alphabet: str
    domain: str

    @property
    def name(self) -> str:
        return f"{self.alphabet}-{self.domain}"

    @property
    def characters(self) -> str:
        return ALPHABETS[self.alphabet]

    @property
    def class_names(self) -> list[str]:
        return [class_name(c) for c in self.characters]

    def outlines(self, faces: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Every character in every face that has it: uint8 [n, 56, 56], labels int64 [n]."""
        cell = self.alphabet in CELL_ALPHABETS
        pairs = [
            (outline(c, face, cell=cell), i)
            for i, c in enumerate(self.characters)
            for face in faces_with(c, faces)
        ]
        return torch.from_numpy(np.stack([mask for mask, _ in pairs])), torch.tensor(
            [label for _, label in pairs]
        )

    def render(
        self, outlines: torch.Tensor, placement: Placement, generator: torch.Generator
    ) -> torch.Tensor:
        """Pictures in this task's domain: uint8 [n, 56, 56] → uint8 [n, 3, 28, 28]."""
        return apply_domain(self.domain, view(outlines, placement, generator), generator)

    def test_set(self, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The fixed test set in faces never trained on: uint8 [n, 3, 28, 28], labels int64 [n].

        Every class has `per_class` images: the faces that have its character take turns, and every image is
        placed anew.  A task has the same pictures at every call.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/test".encode()))
        outlines, labels = self.outlines(TEST_FACES)
        rows = []
        for label in range(len(self.characters)):
            own = (labels == label).nonzero().flatten()
            rows.append(own[torch.arange(per_class) % len(own)])
        index = torch.cat(rows)
        return self.render(outlines[index], TEST_PLACEMENT, generator), labels[index]

    def training_batch(
        self, pool: tuple[torch.Tensor, torch.Tensor], size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`size` random training views from `pool`, the result of ``outlines(TRAIN_FACES)``."""
        outlines, labels = pool
        index = torch.randint(len(outlines), (size,), generator=generator)
        return self.render(outlines[index], TRAIN_PLACEMENT, generator), labels[index]


def _tasks(*names: str) -> tuple[GlyphTask, ...]:
    return tuple(GlyphTask(*name.split("-", 1)) for name in names)


_TWENTY = _tasks(
    "greek-inverted",
    "cyrillic-checker",
    "hebrew-inverted",
    "georgian-noise",
    "armenian-checker",
    "arabic-mirrored",
    "box-noise",
    "syllabics-colour",
    "lao-colour",
    "braille-mirrored",
    "arrows-texture",
    "operators-texture",
    "lisu-blur",
    "tifinagh-blur",
    "hexagrams-faint",
    "shapes-faint",
    "latin-contour",
    "dingbats-contour",
    "ipa-stripes",
    "signs-stripes",
)

#: Suites by name.  In every suite at least half of the tasks share their domain with another task, so that
#: the domain alone does not give the task away; in `glyphs8-shared` all of them share one.
SUITES: dict[str, tuple[GlyphTask, ...]] = {
    "glyphs4": _TWENTY[:4],
    "glyphs8": _TWENTY[:8],
    "glyphs20": _TWENTY,
    "glyphs8-shared": tuple(GlyphTask(task.alphabet, "checker") for task in _TWENTY[:8]),
}

#: Tasks for choosing settings; none of them is in a suite above.
TUNING_TASKS = _tasks(
    "capitals-inverted", "apl-checker", "blackboard-noise", "nko-mirrored", "digits-colour", "blocks-inverted"
)

__all__ = ["SUITES", "TRAIN_FACES", "TUNING_TASKS", "GlyphTask"]
