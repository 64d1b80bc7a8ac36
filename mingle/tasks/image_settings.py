"""The configuration of an image processor: checked before transformers sees it, and compared with another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, read_json

_FILES = ("processor_config.json", "preprocessor_config.json")
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_SIDES = (("shortest_edge",), ("height", "width"))
_MAX_SIDE = 4096


def differing_preparation(base: Path, tuned: Path) -> list[str]:
    """How the image processors of two folders differ, in words; empty where one has none, or they are alike.

    Raises:
        CheckpointError: a broken configuration.
    """
    found = [_found(folder) for folder in (base, tuned)]
    here, there = (_pixels(settings[1]) if settings else {} for settings in found)
    differing = [
        f"{name} is {there[name]!r}, in the base {value!r}"
        for name, value in here.items()
        if name in there and there[name] != value
    ]
    if not differing:
        return []
    return [f"its images were prepared otherwise ({'; '.join(differing)}); the base's way is kept"]


def _pixels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the pixels, in the form of new files."""
    names = (*_SWITCHES, "size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    pixels = {name: settings[name] for name in names if settings.get(name) is not None}
    for name, sides in (("size", _SIDES[0]), ("crop_size", _SIDES[1])):
        if isinstance(pixels.get(name), int):
            pixels[name] = dict.fromkeys(sides, pixels[name])
    return pixels


def read_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that counts, by transformers' own rule, and the processor's settings in it.

    Raises:
        CheckpointError: no such file, or a broken one.
    """
    found = _found(folder)
    if found is None:
        raise CheckpointError(
            f"{folder}: no image processor (preprocessor_config.json, or an image_processor in "
            "processor_config.json)"
        )
    return found


def _found(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    for name in _FILES:
        path = contained(folder, name)
        if not path.exists() and not path.is_symlink():
            continue
        found = read_json(path)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
        if name == "processor_config.json":
            if "image_processor" not in found:
                continue  # it describes the other parts of a processor
            found = found["image_processor"]
            if not isinstance(found, dict):
                raise CheckpointError(f"{path}: image_processor: expected an object, found {found!r}")
        return path, found
    return None


def check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse a field that transformers would stumble over; null stands for CLIP's own value."""
    given = {key: value for key, value in settings.items() if value is not None}

    def refuse(key: str, expected: str) -> None:
        raise CheckpointError(f"{path}: {key} is {given[key]!r}, expected {expected}")

    for key in _SWITCHES:
        if key in given and not isinstance(given[key], bool):
            refuse(key, "true or false")
    for key in ("size", "crop_size"):
        if key in given and not _is_size(given[key]):
            refuse(key, f"1 to {_MAX_SIDE} pixels, as a number, as height and width, or as shortest_edge")
    for key in ("image_mean", "image_std"):
        if key in given and not _are_channels(given[key]):
            refuse(key, "three finite numbers")
    for key in ("image_std", "rescale_factor"):
        numbers = given[key] if isinstance(given.get(key), list) else [given.get(key, 1)]
        if not all(_is_number(number) and number > 0 for number in numbers):
            refuse(key, "more than 0")
    if "resample" in given and given["resample"] not in range(6):
        refuse("resample", "the number of a filter of Pillow, 0 to 5")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIDE


def _is_size(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) == 2 and all(map(_is_side, value))
    if isinstance(value, dict):
        sides = {key: side for key, side in value.items() if side is not None}
        complete = any(set(names) <= set(sides) for names in _SIDES)
        return complete and all(map(_is_side, sides.values()))
    return _is_side(value)


def _are_channels(value: Any) -> bool:
    """One number for each of the three channels, or one for all."""
    numbers = value if isinstance(value, list) else [value] * 3
    return len(numbers) == 3 and all(map(_is_number, numbers))
