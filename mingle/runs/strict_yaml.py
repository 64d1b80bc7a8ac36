"""A YAML file as plain data, whoever wrote it: no tags, no key twice, and no more than a config can need."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mingle.io.files import similar
from mingle.options import OptionError, shown

_MAX_CHARACTERS, _MAX_NODES, _MAX_SCALAR, _MAX_DEPTH = 1_000_000, 20_000, 3000, 20
_MERGE = "tag:yaml.org,2002:merge"  # of the key <<, which brings in the keys of another mapping


def read(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        OptionError: no such file, bad YAML, or anything that has no place in a config; the message names the
            file, and the line where there is one.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_CHARACTERS + 1)
        if len(data) > _MAX_CHARACTERS:
            raise ValueError(f"expected at most {_MAX_CHARACTERS} bytes")
        text = data.decode()
        _refuse_excess(text)
        return yaml.load(text, _UniqueKeys)
    except FileNotFoundError as error:
        raise OptionError(f"{path}: {error}{similar(path)}") from None
    # ValueError: also text that is not UTF-8, a date that does not exist, a number of too many digits.
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise OptionError(f"{path}: {error}") from None


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """Reads only YAML's plain types, and refuses a key that appears twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in seen:
                message = f"the key {key!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse_excess(text: str) -> None:
    """Raise `ValueError` for what no config holds, and what would take long to read or much memory to show.

    Aliases count as what they stand for: a few lines of them can stand for gigabytes.
    """
    sizes: dict[str | None, int] = {}  # anchor → characters
    # The collections around: anchor, and characters so far.
    inside: list[tuple[str | None, int]] = [(None, 0)]
    for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        line = f"line {event.start_mark.line + 1}"
        anchor = getattr(event, "anchor", None)
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{line}: {shown(event.tag)}: tags are not read")
        size = 1
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ValueError(
                    f"{line}: the alias {shown(anchor)} stands for nothing, or for what it is in"
                )
            size = sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # half of a surrogate pair cannot be written anywhere
            size = sizes[anchor] = len(event.value)
            if size > _MAX_SCALAR:
                raise ValueError(f"{line}: a value of {size} characters, expected at most {_MAX_SCALAR}")
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(anchor, None)
            inside.append((anchor, 0))
            if len(inside) > _MAX_DEPTH:
                raise ValueError(f"{line}: nested more than {_MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = inside.pop()
            sizes[anchor] = size
        around, total = inside.pop()
        inside.append((around, total + size))
        if total + size > _MAX_CHARACTERS or number > _MAX_NODES:
            raise ValueError(f"{line}: expected at most {_MAX_CHARACTERS} characters and {_MAX_NODES} values")
