"""A small CLIP folder that a test may break, and an image folder for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mingle import suites
from mingle.suites import Suite, glyphs

CLASSES = ("alpha", "beta", "gamma")
#: classes and templates of a check
PROMPTS = (["alpha", "beta"], ["a glyph of {}."])
#: what stands for a large file in a clone without Git LFS
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 605\n"


def clip_copy(folder: Path) -> Path:
    """The CLIP that ships with the package, in a folder of the test's own."""
    return Path(shutil.copytree(glyphs.BASE, folder))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Let `change` edit the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(*keys_and_value):
    """A change of one value deep inside a JSON document."""
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def drop(*keys):
    *outer, last = keys

    def change(content):
        for key in outer:
            content = content[key]
        del content[last]

    return change


def shade(level: int, width: int = 40, height: int = 40) -> Image.Image:
    """An RGB picture: a horizontal ramp, inverted at the top, with a corner in `level`."""
    ramp = np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1))
    ramp[: height // 3] = 255 - ramp[: height // 3]
    ramp[: height // 6, : width // 6] = level
    return Image.fromarray(np.stack([ramp, 255 - ramp, ramp], -1))


def image_folder(folder: Path, per_class: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """A suite of one task, ``letters``, with PNG images."""
    for number, name in enumerate(classes):
        (folder / "letters" / name).mkdir(parents=True)
        for i in range(per_class):
            shade(40 * number + i).save(folder / "letters" / name / f"{i}.png")
    return folder


def opened(folder: Path, base: Path = glyphs.BASE, protocol: str = "strict", samples: int = 1) -> Suite:
    """The suite of an image folder."""
    return suites.load(str(folder), base=base, protocol=protocol, samples_per_class=samples)
