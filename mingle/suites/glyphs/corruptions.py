"""The seven corruptions of the paper's robustness table, at strengths that suit 28-pixel pictures.

Each maps uint8 pictures [n, 3, 28, 28] to uint8 pictures of the same shape and is deterministic.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Corruption = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _bytes(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.clamp(0, 255).round().to(torch.uint8)


def contrast(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Differences from each picture's mean shrink to a fifth."""
    values = pictures.float()
    mean = values.mean((1, 2, 3), keepdim=True)
    return _bytes(mean + 0.2 * (values - mean))


def gaussian_noise(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """σ = 0.15 of the range."""
    return _bytes(pictures + 0.15 * 255 * torch.randn(pictures.shape, generator=generator))


def impulse_noise(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """8 per cent of all values become black or white."""
    coin = torch.rand(pictures.shape, generator=generator)
    return torch.where(coin < 0.04, 0, torch.where(coin > 0.96, 255, pictures)).to(torch.uint8)


def jpeg_compression(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """JPEG at quality 12."""
    results = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=12)
        results.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    return torch.stack(results)


def motion_blur(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A five-pixel diagonal streak."""
    kernel = (torch.eye(5) / 5).expand(3, 1, 5, 5)
    return _bytes(F.conv2d(F.pad(pictures.float(), (2, 2, 2, 2), mode="replicate"), kernel, groups=3))


def pixelate(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blocks of two by two pixels."""
    return _bytes(F.interpolate(F.avg_pool2d(pictures.float(), 2), scale_factor=2.0, mode="nearest"))


def spatter(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Grey drops over about a tenth of the picture."""
    field = torch.randn(len(pictures), 1, 28, 28, generator=generator)
    field = F.avg_pool2d(F.pad(field, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    drops = field > 0.43  # the mean of nine normal values has σ = 1/3: one value in ten lies above
    return torch.where(drops, 96, pictures).to(torch.uint8)


CORRUPTIONS: dict[str, Corruption] = {
    f.__name__: f
    for f in (contrast, gaussian_noise, impulse_noise, jpeg_compression, motion_blur, pixelate, spatter)
}


def corrupt(name: str, pictures: torch.Tensor) -> torch.Tensor:
    """Corrupted copies; the same pictures give the same copies."""
    return CORRUPTIONS[name](pictures, torch.Generator().manual_seed(zlib.crc32(name.encode())))
