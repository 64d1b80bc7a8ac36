"""Regular expressions from strangers' files, matched in a time that does not explode.

`re` tries one way after another to match, and with a pattern such as ``(a+)+b`` it would try for centuries.
Here all ways are followed at once: each part of a pattern takes the places up to which the text was matched,
and gives those up to which it is matched then.  What matches is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import reduce

#: the text, and the places up to which it was matched → the places up to which it is matched after the part
_Part = Callable[[str, frozenset[int]], frozenset[int]]

#: one character, or what stands for one
_ATOM = re.compile(
    r"\\[dDsSwW.^$*+?()\[\]{}|\\/_ -]|\[\^?\]?(?:\\.|[^\\\]])*\]|[^\\()|*+?{}\[\]^$]", re.DOTALL
)
_REPEAT = re.compile(r"(?:\{(\d{1,4})(,?)(\d{0,4})\}|([*+?]))\??")
_SIMPLE = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_CHOICES = frozenset("*+?{|")
_MAX_LENGTH, _MAX_DEPTH = 2000, 5


class Ending:
    """A regular expression for the last components of a dotted name.

    Back-references, look-around, flags and possessive repeats are not known where there are repeats or
    alternatives.

    Raises:
        ValueError: not a regular expression, or not one of these; the message says where it ends to be one.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"{len(text)} characters, expected at most {_MAX_LENGTH}")
        self._text, self._at = text, 0
        self._single = None if _CHOICES & set(text) else self._compile(text)
        if self._single is None:
            self._whole = self._alternatives(0)
            if self._at < len(text):
                raise self._error()

    def matches(self, name: str) -> bool:
        """Whether `name` is a match, or ends with a dot and a match; it has no line breaks."""
        starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
        if self._single is not None:  # one way to try from each start: `re` is the faster
            return any(self._single.fullmatch(name, start) for start in starts)
        return len(name) in self._whole(name, frozenset(starts))

    def _alternatives(self, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise ValueError(f"groups nested more than {_MAX_DEPTH} deep")
        parts = [self._sequence(depth)]
        while self._take("|"):
            parts.append(self._sequence(depth))
        return parts[0] if len(parts) == 1 else _any_of(parts)

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(depth))
        return _in_turn(parts)

    def _repeated(self, depth: int) -> _Part:
        if self._take("^"):
            return lambda text, places: places & {0}
        if self._take("$"):
            return lambda text, places: places & {len(text)}
        part = self._group(depth) if self._take("(") else self._atom()
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            return part
        self._at = found.end()
        low, comma, high, simple = found.groups()
        if simple:
            return _repeat(part, *_SIMPLE[simple])
        least, most = int(low), int(high) if high else None if comma else int(low)
        if most is not None and most < least:
            raise self._error()
        return _repeat(part, least, most)

    def _group(self, depth: int) -> _Part:
        if not self._take("?:") and self._text.startswith("?", self._at):
            raise self._error()
        part = self._alternatives(depth + 1)
        if not self._take(")"):
            raise self._error()
        return part

    def _atom(self) -> _Part:
        found = _ATOM.match(self._text, self._at)
        if found is None:
            raise self._error()
        one = self._compile(found[0]).fullmatch
        self._at = found.end()
        return lambda text, places: frozenset(
            place + 1 for place in places if place < len(text) and one(text[place])
        )

    def _compile(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{error}, from character {self._at + 1} on") from None

    def _take(self, token: str) -> bool:
        if self._text.startswith(token, self._at):
            self._at += len(token)
            return True
        return False

    def _error(self) -> ValueError:
        return ValueError(f"not understood from character {self._at + 1} on")


def _any_of(parts: Iterable[_Part]) -> _Part:
    return lambda text, places: frozenset().union(*(part(text, places) for part in parts))


def _in_turn(parts: Iterable[_Part]) -> _Part:
    return lambda text, places: reduce(
        lambda reached, part: part(text, reached) if reached else reached, parts, places
    )


def _repeat(part: _Part, least: int, most: int | None) -> _Part:
    def repeated(text: str, places: frozenset[int]) -> frozenset[int]:
        for _ in range(least):
            before, places = places, part(text, places)
            if places == before:
                break
        reached, new, left = places, places, most
        while new and (left is None or left > least):
            new = part(text, new) - reached
            reached |= new
            left = None if left is None else left - 1
        return reached

    return repeated
