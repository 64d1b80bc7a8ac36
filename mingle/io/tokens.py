"""The tokens of a folder's tokenizer by their numbers, as far as its files say so in the open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, naming, read_json
from mingle.io.tokenizer_files import MAX_BYTES, MAX_VALUES

Pairs = Iterable[tuple[Any, Any]]


def tokens(folder: Path) -> dict[int, str]:
    """Number → token; of a vocabulary in sentencepiece's own format only the tokens that were added to it.

    Nothing is refused: what cannot be read is left out, as names of tokens only explain what numbers say.
    """
    found: dict[int, str] = {}
    for name, pairs in (*_WHOLE, *_ADDED):
        found |= dict(_read(folder, name, pairs))
    return found


def has_vocabulary(folder: Path) -> bool:
    """Whether `tokens` knows all of a folder's tokens."""
    return any((folder / name).exists() for name, _ in _WHOLE)


def _read(folder: Path, name: str, pairs: Callable[[Any], Pairs]) -> Iterator[tuple[int, str]]:
    if not (folder / name).exists():
        return
    try:
        path = contained(folder, name)
        if path.suffix == ".txt":
            with naming(path):
                content: Any = path.read_text(errors="replace").splitlines()
        else:
            content = read_json(path, max_bytes=MAX_BYTES, max_values=MAX_VALUES)
    except CheckpointError:
        return
    for number, token in pairs(content):
        if isinstance(token, str) and type(number) is int:
            yield number, token


def _numbered(content: Any) -> Pairs:
    """Of an object from tokens to numbers."""
    return [(number, token) for token, number in _object(content).items()]


def _fast(content: Any) -> Pairs:
    """Of a ``tokenizer.json``."""
    vocabulary = _object(_object(content).get("model")).get("vocab", ())
    for number, piece in enumerate(_list(vocabulary)):
        if isinstance(piece, list) and piece:
            yield number, piece[0]
    yield from _numbered(vocabulary)
    for token in map(_object, _list(_object(content).get("added_tokens"))):
        yield token.get("id"), token.get("content")


def _decoder(content: Any) -> Pairs:
    """Of a ``tokenizer_config.json``."""
    decoder = _object(_object(content).get("added_tokens_decoder"))
    return [
        (int(number), _object(token).get("content"))
        for number, token in decoder.items()
        if number.isdecimal()
    ]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


#: files with all tokens, and with those that were added to others
_WHOLE = (("vocab.txt", enumerate), ("vocab.json", _numbered), ("tokenizer.json", _fast))
_ADDED = (("added_tokens.json", _numbered), ("tokenizer_config.json", _decoder))
