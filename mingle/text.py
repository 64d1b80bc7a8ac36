"""Data as text, in a terminal, in Markdown, in CSV and in a plot: shown as it is, it does nothing there."""

from __future__ import annotations

import re
import unicodedata

#: control characters, those that format or reverse text unseen, halves of surrogate pairs, line separators
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
#: what Markdown on GitHub takes as a sign of its own; an underscore inside a word is none
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")
#: how a spreadsheet's formula begins
_FORMULA = ("=", "+", "-", "@")
#: the most characters of a name in a plot, and of its title: names may be of any length, pictures may not
NAME_LENGTH, TITLE_LENGTH = 60, 200


def visible(text: str, keep: str = "") -> str:
    r"""The text with a backslash escape, such as ``\x1b``, for every character that cannot be seen.

    Such characters steer terminals, break lines, reverse what follows, or have no encoding.  Spaces stay, and
    so do the characters in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNSEEN and char not in keep
        else char
        for char in text
    )


def markdown_cell(text: str) -> str:
    """Text for a table or a line of Markdown."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def csv_cell(text: str) -> str:
    """Text for a spreadsheet: an apostrophe stands before what would be computed there as a formula."""
    shown = visible(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def shortened(text: str, length: int = NAME_LENGTH) -> str:
    """The visible text without its middle where it is longer than `length`."""
    shown = visible(text)
    return shown if len(shown) <= length else f"{shown[: length // 2]} … {shown[-length // 3 :]}"


def plot_label(text: str, length: int = NAME_LENGTH) -> str:
    """Text for Matplotlib: without mathematics, and without its middle where it is longer than `length`."""
    return shortened(text, length).replace("$", r"\$")
