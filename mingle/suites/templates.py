"""``templates.txt``: prompts with ``{}`` in the class name's place, one per line."""

from __future__ import annotations

import io
import string
from pathlib import Path

from mingle.io.files import naming


def read_templates(path: Path) -> list[str]:
    """The prompts in a UTF-8 file; blank lines do not count.

    Raises:
        CheckpointError: a file that cannot be opened.
        ValueError: not UTF-8, no prompts, or a line that is not a prompt; the message names file and line.
    """
    with naming(path):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {place}: not UTF-8 text ({error.reason})") from None
    templates = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        template = line.removesuffix("\n")
        if template.strip():
            _check(template, f"{path}, line {number}")
            templates.append(template)
    if not templates:
        raise ValueError(f"{path}: no prompts in it; write one per line, with {{}} for the class name")
    return templates


def _check(template: str, where: str) -> None:
    """Raise `ValueError` unless the template is a format with one ``{}`` and no other field.

    By the rules of formats, ``{{`` and ``}}`` stand for braces in the prompt.
    """
    try:
        fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise ValueError(f"{where}: the prompt {template!r} is not a format: {error}") from None
    if not fields:
        raise ValueError(f"{where}: the prompt {template!r} has no {{}} for the class name")
    if [field[1:] for field in fields] != [("", "", None)]:
        raise ValueError(
            f"{where}: the prompt {template!r} needs exactly one {{}}, for the class name, and no other field"
        )
