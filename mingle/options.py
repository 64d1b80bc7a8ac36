"""Options as dataclasses: unknown names are refused, values are checked against the declared types.

And types for arguments of a command line, which refuse a value in the same words.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T")


class OptionError(ValueError):
    """An option that does not exist, or that has an impossible value."""


def shown(value: object, limit: int = 300) -> str:
    """`repr(value)` for a message, without its middle where it is long: strangers' files hold anything."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 50]} … {text[-50:]}"


def closest(name: str, known: Iterable[str], likeness: float = 0.4) -> str | None:
    """The known name most like `name`; None where none is as like it, from 0 to 1."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff=likeness)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to `name`, or nothing."""
    found = closest(name, known)
    return f"; did you mean {found!r}?" if found else ""


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `OptionError` for the first of `given` that is not `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            raise OptionError(f"{where}: unknown option {shown(name)}{nearest(str(name), known)}")


def build(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from a mapping.

    Raises:
        OptionError: an unknown name, or a value of the wrong type; the message begins with `where`.
    """
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    refuse_unknown(given, names, where)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise OptionError(f"{where}: {f.name!r} is missing")
    values = {name: checked(value, hints[name], f"{where}: {name}") for name, value in given.items()}
    try:
        return cls(**values)
    except OptionError:
        raise
    except ValueError as error:  # from the class's own checks
        raise OptionError(f"{where}: {error}") from None


def require_positive(options: object, *names: str) -> None:
    """Raise `ValueError` unless each of these whole numbers among the options is 1 or more, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={shown(value)}: expected a positive integer")


def require_not_negative(options: object, *names: str) -> None:
    """Raise `ValueError` unless each of these numbers among the options is 0 or more."""
    for name in names:
        if getattr(options, name) < 0:
            raise ValueError(f"{name}={shown(getattr(options, name))}: expected a value >= 0")


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: int, float, str, bool, a Literal, a tuple or dict of them, or a union.

    Raises:
        OptionError: it is not of that type; NaN is not of any.
    """
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            names = [str(arg) for arg in args]
            expected = ", ".join(names)
            raise OptionError(
                f"{where}: {shown(value)}{nearest(str(value), names)}; expected one of {expected}"
            )
        return value
    if origin in (Union, UnionType):
        for arg in args:
            try:
                return checked(value, arg, where)
            except OptionError:
                continue
        raise OptionError(f"{where}: {shown(value)} is not of type {' | '.join(map(_kind, args))}")
    if is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise OptionError(f"{where}: {shown(value)} is not a mapping")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise OptionError(f"{where}: {shown(value)} is not a mapping")
        return {checked(key, args[0], where): checked(item, args[1], where) for key, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise OptionError(f"{where}: {shown(value)} is not a list")
        return tuple(checked(item, args[0], where) for item in value)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-4 as a string
        except (ValueError, OverflowError):
            raise OptionError(f"{where}: {shown(value)} is not a number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise OptionError(f"{where}: {shown(value)} is not of type {getattr(hint, '__name__', hint)}")
    if isinstance(value, float) and math.isnan(value):
        raise OptionError(f"{where}: NaN is not a number that can be worked with")
    return value


def _kind(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def one_of(names: Collection[str], what: str) -> Callable[[str], str]:
    """A type of arguments: one of these names; others are refused, and the nearest is named."""

    def name(given: str) -> str:
        if given not in names:
            raise argparse.ArgumentTypeError(f"no {what} is called {given!r}{nearest(given, names)}")
        return given

    return name


def a_device(given: str) -> torch.device:
    """A type of arguments: a device that is there."""
    try:
        return torch.empty(0, device=given).device
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise argparse.ArgumentTypeError(f"{given!r}: {str(error).splitlines()[0]}") from None
