"""The image processor of a folder, and whether it makes what the model takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mingle.io.files import CheckpointError
from mingle.tasks.configs import broken
from mingle.tasks.image_settings import check_settings, read_settings
from mingle.tasks.pixels import ImageError

#: of processors that make ``pixel_values`` [n, 3, h, w]; they differ in what a file need not say
_KINDS = ("CLIP", "Siglip", "ViT", "DeiT", "Bit", "Beit", "ConvNext")


def _kind(settings: Mapping[str, Any]) -> str:
    """Which of `_KINDS` the settings are for, under the present or an earlier name; CLIP for any other."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    return next(
        (kind for kind in _KINDS if re.fullmatch(rf"{kind}(ImageProcessor\w*|FeatureExtractor)", str(name))),
        "CLIP",
    )


class ImageProcessor:
    """8-bit RGB pixels → a model's ``pixel_values``.

    Args:
        folder: a local folder in hub format, with a ``preprocessor_config.json``, or a
            ``processor_config.json`` that has the image processor in it.

    Raises:
        CheckpointError: neither file, or one that is broken; the message names file and field.
    """

    def __init__(self, folder: str | Path) -> None:
        import transformers

        self.path, settings = read_settings(Path(folder))
        check_settings(settings, self.path)
        made_by = getattr(transformers, f"{_kind(settings)}ImageProcessorPil")
        try:
            self._processor = made_by.from_dict(settings)
        except broken() as error:
            raise CheckpointError(f"{self.path}: no image processor can be made of it: {error}") from None

    def __call__(self, images: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
        """Pixels uint8 [3, H, W] of each image → float32 [n, 3, h, w].

        Raises:
            ImageError: see `check_size`.
        """
        for image in images:
            self.check_size(*image.shape[:0:-1])
        # Which dimension holds the channels cannot be told from an image three pixels wide: it is said.
        result = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_first")
        pixels: torch.Tensor = result["pixel_values"]
        return pixels

    def check_size(self, width: int, height: int) -> None:
        """Refuse an image so narrow that, once its shorter side is as long as the model needs, it is huge.

        Raises:
            ImageError: it would then have more pixels than Pillow lets a file have.
        """
        edge = self._processor.size.get("shortest_edge") if self._processor.do_resize else None
        limit = Image.MAX_IMAGE_PIXELS
        if edge and limit and edge * edge * max(width, height) > 2 * limit * min(width, height):
            raise ImageError(
                f"{width} × {height} pixels, too narrow to be resized to a shorter side of {edge} pixels"
            )

    def check_output(self, size: int) -> None:
        """Raise `CheckpointError` unless images of any shape become [3, size, size], and finite."""
        try:
            shape, finite = None, True
            for probe in (np.zeros((3, 64, 48), np.uint8), np.full((3, 48, 64), 255, np.uint8)):
                made = self([probe])
                shape, finite = list(made.shape[1:]), finite and bool(made.isfinite().all())
                if shape != [3, size, size]:
                    break
        except broken() as error:
            raise CheckpointError(f"{self.path}: its image processor fails: {error}") from None
        if shape != [3, size, size]:
            raise CheckpointError(
                f"{self.path}: makes an image {shape}, and the model takes [3, {size}, {size}]"
            )
        if not finite:
            raise CheckpointError(f"{self.path}: makes images that are not finite")
