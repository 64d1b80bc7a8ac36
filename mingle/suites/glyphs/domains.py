"""Visual domains: how a glyph's ink becomes a picture.

Each domain maps ink in [0, 1] of shape [n, 1, 28, 28] to RGB in [0, 1] of shape [n, 3, 28, 28].  `plain` is
what the base model mostly saw; every other domain is foreign enough to spoil zero-shot recognition, as street
numbers or traffic signs are for CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Domain = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _uniform(
    ink: torch.Tensor, channels: int, low: float, high: float, generator: torch.Generator
) -> torch.Tensor:
    """One value per image and channel, [n, channels, 1, 1]."""
    return low + (high - low) * torch.rand(len(ink), channels, 1, 1, generator=generator)


def _noise(ink: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    return sigma * torch.randn(ink.shape, generator=generator)


def _wave(ink: torch.Tensor, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """A plane wave of random direction, phase and period (pixels in [low, high]), in [-1, 1]."""
    size = ink.shape[-1]
    axis = torch.arange(size, dtype=torch.float32)
    angle = _uniform(ink, 1, 0, math.pi, generator)
    period = _uniform(ink, 1, low, high, generator)
    phase = _uniform(ink, 1, 0, 2 * math.pi, generator)
    return torch.sin(
        2 * math.pi / period * (axis[None, :] * torch.cos(angle) + axis[:, None] * torch.sin(angle)) + phase
    )


def _gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.mT)


def plain(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Black on white."""
    return 1 - ink


def inverted(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """White on black."""
    return ink


def checker(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Ink and paper change places on a 7-pixel chessboard."""
    cell = torch.arange(ink.shape[-1]) // 7
    board = ((cell[:, None] + cell[None, :]) % 2).float()
    return 1 - (ink - board).abs()


def noise(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Heavy Gaussian sensor noise."""
    return 1 - (0.2 + 0.6 * ink + _noise(ink, 0.22, generator))


def mirrored(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Seen in a mirror."""
    return 1 - ink.flip(-1)


def colour(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Glyph and paper in two random colours of similar brightness."""
    paper = _uniform(ink, 3, 0.0, 1.0, generator)
    glyph = _uniform(ink, 3, 0.0, 1.0, generator)
    paper, glyph = (c - c.mean(1, keepdim=True) + 0.5 for c in (paper, glyph))
    apart = glyph - paper
    length = apart.norm(dim=1, keepdim=True).clamp_min(1e-3)
    glyph = paper + apart * (0.55 / length).clamp_min(1.0)  # never less than 0.55 apart in RGB
    return paper + (glyph - paper) * ink


def texture(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Grey ink on a coarse random wave."""
    background = 0.5 + 0.5 * _wave(ink, 6, 14, generator)
    return background * (1 - ink) + 0.5 * ink


def blur(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Out of focus."""
    return 1 - 1.4 * _gaussian_blur(ink, 1.6)


def faint(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Low contrast of either sign, with a little noise."""
    level = _uniform(ink, 1, 0.3, 0.7, generator)
    sign = torch.sign(_uniform(ink, 1, -1, 1, generator))
    return level + 0.16 * sign * ink + _noise(ink, 0.03, generator)


def contour(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Only the edges of the strokes."""
    vertical = F.pad(ink[..., 1:, :] - ink[..., :-1, :], (0, 0, 0, 1))
    horizontal = F.pad(ink[..., :, 1:] - ink[..., :, :-1], (0, 1))
    return (1 - 1.3 * (vertical**2 + horizontal**2).sqrt()).clamp_min(0)


def stripes(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Seen through hard black and white bars."""
    bars = (_wave(ink, 7, 10, generator) > 0.5).float()
    sign = (_uniform(ink, 1, -1, 1, generator) > 0).float()
    return (1 - ink) * (1 - bars) + bars * sign


DOMAINS: dict[str, Domain] = {
    f.__name__: f
    for f in (plain, inverted, checker, noise, mirrored, colour, texture, blur, faint, contour, stripes)
}


def apply_domain(name: str, ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures of the named domain as bytes: uint8 [n, 3, 28, 28]."""
    picture = DOMAINS[name](ink, generator).expand(-1, 3, -1, -1)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)
