"""The arguments of a module's call by their names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments of `module` together, those that it passes on unnamed included."""
    signature = inspect.signature(module.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def takes(module: nn.Module, name: str) -> bool:
    """Whether `module` has an argument of this name."""
    return name in inspect.signature(module.forward).parameters
