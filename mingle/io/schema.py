"""Strangers' JSON held against the form that it should have, before anything reads it.

A form is one of these:

    str            a text
    int, float     a whole number of 64 bits; a finite number
    re.Pattern     a text that the pattern matches as a whole
    object         anything
    [form]         a list of such
    {"key": form}  an object that has these keys, and maybe others
    {str: form}    an object with any keys
    (form, None)   such, or null
    Several(form)  such, or a list of such
    Absent(form)   as the form of a key: the key may be missing, as in files of earlier versions
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mingle.io.files import CheckpointError

Form: TypeAlias = Any


@dataclass(frozen=True)
class Absent:
    """The form of a key that may be missing."""

    form: Form


@dataclass(frozen=True)
class Several:
    """The form of what may also be a list of such."""

    form: Form


_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def check(value: Any, form: Form, file: Path) -> None:
    """Raise `CheckpointError`, naming the file and the place in it, unless the value has the form."""
    for fault in _faults(value, form, ""):
        raise CheckpointError(f"{file}: {fault}")


def _faults(value: Any, form: Form, where: str) -> Iterator[str]:
    if isinstance(form, Several):
        form = [form.form] if isinstance(value, list) else form.form
    if isinstance(form, tuple):
        if value is not None:
            yield from _faults(value, form[0], where)
    elif not _fits(value, form):
        text = repr(value)
        found = text if len(text) < 80 else f"{text[:80]}…"
        yield f"{where or 'the whole'}: expected {_described(form)}, found {found}"
    elif isinstance(form, list):
        for i, item in enumerate(value):
            yield from _faults(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        needed = [key for key, inner in form.items() if key is not str and not isinstance(inner, Absent)]
        yield from (f"{_inside(where, key)} is missing" for key in needed if key not in value)
        for key, item in value.items():
            if (inner := form.get(key, form.get(str))) is not None:
                wanted = inner.form if isinstance(inner, Absent) else inner
                yield from _faults(item, wanted, _inside(where, key))


def _fits(value: Any, form: Form) -> bool:
    """Whether the value itself, without what is in it, is what the form says."""
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if form is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if form is float:
        return type(value) in (int, float) and -1e300 < value < 1e300
    return isinstance(value, type(form) if isinstance(form, list | dict) else form)


def _described(form: Form) -> str:
    if isinstance(form, re.Pattern):
        return f"a text of the form {form.pattern}"
    return _NAMES[type(form) if isinstance(form, list | dict) else form]


def _inside(where: str, key: str) -> str:
    """The place of a key; quoted where it could be taken for something else."""
    name = key if re.fullmatch(r"\w+", key) else repr(key)
    return f"{where}.{name}" if where else name
