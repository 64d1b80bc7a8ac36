"""The arguments of a module's call by their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments of `module` together."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)


def takes(module: nn.Module, name: str) -> bool:
    """Whether `module` has an argument of this name."""
    return name in inspect.signature(module.forward).parameters


def first_name(module: nn.Module) -> str:
    """The name of the first argument of `module`."""
    return next(iter(inspect.signature(module.forward).parameters))
