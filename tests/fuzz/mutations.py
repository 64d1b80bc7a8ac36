"""Edits of files, drawn from a seeded generator: of their bytes, and of the values that they hold."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: pieces of JSON, YAML and of what breaks their readers
TOKENS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"9", b"-", b"1e9", b"1e999", b"null", b"NaN"),
    *(b"\\u0000", b"\\ud800", b"\0", b"\xff\xff\xff", b"\xef\xbb\xbf", b"\xf0\x9f\x99\x88", b"F64", b"\n"),
    *(b"&a ", b"*a", b"<<: ", b"!!int ", b"!!python/object/apply:os.getcwd []", b"!x ", b"? ", b"- ", b"| "),
    *(b"0x_", b"0b_", b".nan", b"-.inf", b"2024-99-99", b"1:99", b"1_0", b"~", b"%YAML 9\n", b"---\n", b"\t"),
]
#: values that no reader should stumble over
HOSTILE: list[Any] = [
    *(0, 1, -1, 2, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "", " ", "\0", "\ud800", "é", "x" * 300),
    *(
        "../x",
        "/etc/passwd",
        "C:\\x",
        "a/b",
        "~",
        ".",
        "..",
        "[red]",
        "(a+)+$",
        "(a|a)*b",
        "a?" * 25,
        "[",
        "\\",
    ),
    *([], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": []}}, ["x"] * 50, [0, 2**63]),
]


def edit_bytes(data: bytes, chance: random.Random) -> bytes:
    """`data` after one or two edits: a bit flipped, bytes cut, repeated or inserted, or text put in."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 2)):
        place = chance.randrange(len(result) + 1)
        match chance.randrange(7):
            case 0 | 1 if place < len(result):
                result[place] ^= 1 << chance.randrange(8)
            case 2:
                del result[place : place + chance.choice([1, 4, 40, len(result)])]
            case 3:
                result[place:place] = chance.randbytes(chance.choice([1, 8]))
            case 4:
                result[place:place] = result[place : place + 40] * chance.choice([1, 2, 50])
            case kind:
                token = chance.choice(TOKENS) * chance.choice([1, 1, 1, 3, 1500])
                result[place : place + (len(token) if kind == 5 else 0)] = token
    return bytes(result)


def edit_value(value: Any, chance: random.Random) -> Any:
    """`value`, plain data, after one to three edits, each of one place in it."""
    holder = [copy.deepcopy(value)]
    for _ in range(chance.choice([1, 1, 2, 3])):
        place, key = chance.choice(list(_places(holder)))
        place[key] = _edited(place, key, chance)
    return holder[0]


def to_json(value: Any, chance: random.Random) -> bytes:
    """JSON text; in some cases with an edit of its bytes, or with a key that appears twice."""
    text = json.dumps(value).encode()
    match chance.randrange(12):
        case 0:
            return edit_bytes(text, chance)
        case 1 if isinstance(value, dict) and value:
            key = chance.choice(list(value))
            return b"{" + json.dumps({key: value[key]})[1:-1].encode() + b"," + text[1:]
    return text


def _edited(place: Any, key: Any, chance: random.Random) -> Any:
    """What stands at `place[key]` from now on; its neighbours may change too."""
    value = place[key]
    match chance.randrange(9):
        case 0 | 1 | 2:
            return copy.deepcopy(chance.choice(HOSTILE))
        case 3 if type(value) in (int, float):
            return chance.choice(
                [value + 1, value - 1, value * 2, -value, value / 2 if abs(value) < 1e300 else 0.5]
            )
        case 4 if isinstance(value, dict) and value:
            old = chance.choice(list(value))
            if chance.random() < 0.5:
                new = chance.choice([*value, "", "\0", "__metadata__", "x" * 300, old + "x", old[1:]])
                value[new] = value[old]
            del value[old]
            return value
        case 5 if isinstance(value, list) and value:
            index = chance.randrange(len(value))
            if chance.random() < 0.5:
                value.insert(index, copy.deepcopy(value[index]))
            else:
                del value[index]
            return value
        case 6:
            for _ in range(chance.choice([1, 1, 2, 60])):
                value = [value] if chance.random() < 0.5 else {"a": value}
            return value
        case 7 if isinstance(value, str):
            return edit_bytes(value.encode(errors="replace"), chance).decode(errors="replace")
        case _:  # another value of the same container
            return copy.deepcopy(
                place[chance.choice(list(place) if isinstance(place, dict) else range(len(place)))]
            )


def _places(container: Any) -> Any:
    """Every (container, key) in the tree."""
    waiting = [container]
    while waiting:
        container = waiting.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
