"""Images as Pillow shows them, upright and in 8-bit RGB, whatever their file's format and mode."""

from __future__ import annotations

import io
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mingle.io.files import LFS_POINTER

#: what Pillow raises for damaged files, depending on the format and on where the damage is
READER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    ImportError,  # a build of Pillow without the library that the file needs
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
#: EXIF orientation → the transposition that makes the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be used.  The message is the reason; who knows where the image comes from adds that."""


def image_size(file: Path | bytes) -> tuple[int, int]:
    """Width and height by the header; nothing is decoded, and the rest of the file may be damaged.

    Args:
        file: a path, or the bytes of an encoded image.

    Raises:
        ImageError: not an image that Pillow reads, or one with more pixels than Pillow's limit.
    """
    with _opened(file) as image:
        return image.size


def read_image(file: Path | bytes) -> np.ndarray[Any, Any]:
    """The first picture in a file, as `upright_rgb`; for `file` and errors see `image_size`."""
    with _opened(file) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> np.ndarray[Any, Any]:
    """The pixels of an image, uint8 [3, H, W], turned as its EXIF orientation says.

    Modes that hold 8 bits are converted as Pillow does; transparency is dropped.  Of deeper grey images,
    16 bits are divided by 257; 32-bit integers are taken as 8 bits where none is above 255, and as 16 bits
    otherwise; floats are multiplied by 255 where none is above 1, and are taken as 8 bits otherwise.

    Raises:
        ImageError: grey values that are negative, not finite, or above all of these ranges.
    """
    with _quiet():
        image.load()
        orientation = _orientation(image)
        rgb = _eight_bits(image).convert("RGB")
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
    return np.asarray(rgb).transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image deeper than 8 bits in mode L; any other as it is."""
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image
    grey = np.asarray(image)
    if not np.isfinite(grey).all():
        raise ImageError("it has pixels that are NaN or infinite")
    low, high = grey.min(), grey.max()
    if low < 0 or high > (255 if image.mode == "F" else 65535):
        expected = "0 to 1 or 0 to 255" if image.mode == "F" else "0 to 65535"
        raise ImageError(f"its grey values go from {low} to {high}, expected {expected}")
    if image.mode == "F":
        scale = 255.0 if high <= 1 else 1.0
    else:
        # Some versions of Pillow open a PNG of 16 bits as 32-bit integers.
        deep = high > 255 or image.mode != "I" or image.format == "PNG"
        scale = 1 / 257 if deep else 1.0
    return Image.fromarray(np.rint(grey.astype(np.float64) * scale).astype(np.uint8))


def _orientation(image: Image.Image) -> int | None:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except READER_ERRORS:
        return None  # damaged metadata tell nothing about the picture, which is intact
    return orientation if isinstance(orientation, int) else None


@contextmanager
def _opened(file: Path | bytes) -> Iterator[Image.Image]:
    """The image, with every error of Pillow, also while the block reads from it, as an `ImageError`."""
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise ImageError("a folder" if file.is_dir() else "not a regular file")
        with _quiet(), Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
            yield image
    except ImageError:
        raise
    except READER_ERRORS as error:
        raise ImageError(_reason(error, file)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: about large images within the limit, transparency, and odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException, file: Path | bytes) -> str:
    if isinstance(error, UnidentifiedImageError):
        if isinstance(file, Path):
            with open(file, "rb") as opened:
                file = opened.read(len(LFS_POINTER))
        if not file:
            return "an empty file"
        if file.startswith(LFS_POINTER):
            return "a Git LFS pointer, not the image that it stands for; fetch that with `git lfs pull`"
        return "in no format that Pillow knows"
    if isinstance(error, FileNotFoundError) and isinstance(file, Path) and file.is_symlink():
        return f"a link to {file.readlink()}, which does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    plain = isinstance(error, OSError | SyntaxError | ValueError | Image.DecompressionBombError)
    return str(error) if plain and str(error) else f"{type(error).__name__}: {error}"
