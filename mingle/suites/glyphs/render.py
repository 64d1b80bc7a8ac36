"""Glyph images from the fonts that ship inside matplotlib, rendered and augmented deterministically.

Rendering has two stages.  `outline` draws one character of one face into a 56-pixel mask, once; `view` turns
masks into randomly placed 28-pixel glyphs, a whole batch at a time.  Training and test use different faces:
accuracy on a test set measures generalisation to type faces never seen in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 28
_CANVAS = 2 * IMAGE_SIZE
_INK = 44  # longest side of a fitted glyph on the canvas
_CELL_HEIGHT = 46  # ascent + descent of a glyph that keeps its place in its cell

TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBolIta",
)
TEST_FACES = (
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)


@cache
def _face_path(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    # Where raqm is installed, it reorders or drops some right-to-left and combining glyphs: BASIC does not.
    return ImageFont.truetype(str(_face_path(face)), size, layout_engine=ImageFont.Layout.BASIC)


@cache
def _coverage(face: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(_face_path(face), lazy=True) as font:
        return frozenset(font.getBestCmap())


def faces_with(character: str, faces: tuple[str, ...]) -> list[str]:
    """Those of `faces` that draw `character`."""
    return [face for face in faces if ord(character) in _coverage(face)]


@cache
def outline(character: str, face: str, *, cell: bool) -> np.ndarray:
    """Coverage mask of one glyph, uint8 [56, 56], 255 = ink.

    `cell=False` scales the glyph's ink to a common size and centres it; `cell=True` keeps the size and place
    the font gives it.
    """
    if cell:
        probe = _font(face, 64)
        size = max(1, round(64 * _CELL_HEIGHT / sum(probe.getmetrics())))
        font = _font(face, size)
        origin = ((_CANVAS - font.getlength(character)) / 2, (_CANVAS - sum(font.getmetrics())) / 2)
    else:
        left, top, right, bottom = _font(face, 64).getbbox(character)
        size = min(96, max(1, round(64 * _INK / max(right - left, bottom - top, 1))))
        font = _font(face, size)
        left, top, right, bottom = font.getbbox(character)
        origin = ((_CANVAS - left - right) / 2, (_CANVAS - top - bottom) / 2)
    image = Image.new("L", (_CANVAS, _CANVAS), 0)
    ImageDraw.Draw(image).text(origin, character, fill=255, font=font)
    return np.asarray(image)


@dataclass(frozen=True)
class Placement:
    """How far a view may stray from the outline: every range is symmetric."""

    rotation: float  # degrees
    scale: float  # relative
    shift: float  # pixels of the 28-pixel image
    shear: float = 0.0
    weight: float = 0.0  # probability of a bolder, and of a lighter, stroke


TRAIN_PLACEMENT = Placement(rotation=9.0, scale=0.13, shift=2.0, shear=0.2, weight=0.2)
TEST_PLACEMENT = Placement(rotation=6.0, scale=0.08, shift=1.5)


def view(outlines: torch.Tensor, placement: Placement, generator: torch.Generator) -> torch.Tensor:
    """Randomly placed glyphs: uint8 outlines [n, 56, 56] → ink in [0, 1], float32 [n, 1, 28, 28]."""
    n = len(outlines)
    ink = outlines[:, None].float() / 255
    uniform = torch.rand(n, 6, generator=generator) * 2 - 1
    if placement.weight:
        bolder = F.max_pool2d(ink, 3, stride=1, padding=1)
        lighter = -F.max_pool2d(-ink, 3, stride=1, padding=1)
        coin = (uniform[:, 5].abs())[:, None, None, None]
        ink = torch.where(
            coin < placement.weight, bolder, torch.where(coin > 1 - placement.weight, lighter, ink)
        )
    angle = torch.deg2rad(uniform[:, 0] * placement.rotation)
    scale = 1 / (1 + uniform[:, 1] * placement.scale)
    shift = uniform[:, 2:4] * (2 * placement.shift / IMAGE_SIZE)  # in grid units: the image spans [-1, 1]
    shear = uniform[:, 4] * placement.shear
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack(
        [
            torch.stack([cos, shear * cos - sin, shift[:, 0]], 1),
            torch.stack([sin, shear * sin + cos, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows, [n, 1, _CANVAS, _CANVAS], align_corners=False)
    return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)
