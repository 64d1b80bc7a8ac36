"""What the text suites take from the files of WordNet 3.0."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sources import Row

#: the numbers of the files in which lexicographers wrote, of the nouns and verbs that have a task
NOUN_FILES = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    11: "event",
    12: "feeling",
    13: "food",
    14: "group",
    15: "location",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
    21: "possession",
    22: "process",
    23: "quantity",
    24: "relation",
    26: "state",
    27: "substance",
    28: "time",
}
VERB_FILES = {
    29: "body",
    30: "change",
    31: "cognition",
    32: "communication",
    33: "competition",
    34: "consumption",
    35: "contact",
    36: "creation",
    37: "emotion",
    38: "motion",
    39: "perception",
    40: "possession",
    41: "social",
    42: "being",
    43: "weather",
}


@dataclass(frozen=True)
class Synset:
    """Words of one meaning: its key, its file's number, its words, its meaning and where it points."""

    key: str
    file: int
    words: tuple[str, ...]
    gloss: str
    pointers: tuple[tuple[str, str], ...]  # symbol, key


class WordNet:
    """The synsets of a folder with ``data.noun`` and its like, by key."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[str, Synset] = {}
        for part in ("noun", "verb", "adj", "adv"):
            for line in (folder / f"data.{part}").read_text().splitlines():
                if not line.startswith("  "):
                    synset = _parsed(line)
                    self.synsets[synset.key] = synset
        self._below: defaultdict[str, list[str]] = defaultdict(list)
        for synset in self.synsets.values():
            for symbol, key in synset.pointers:
                if symbol == "@":
                    self._below[key].append(synset.key)

    def glosses(self, files: Mapping[int, str]) -> Iterator[Row]:
        """The meaning of every synset of some files; file → class."""
        for synset in self.synsets.values():
            if synset.file in files and len(synset.gloss.split()) > 2:
                yield synset.key, files[synset.file], synset.gloss

    def topics(self, topics: Mapping[str, str]) -> Iterator[Row]:
        """The meaning of every synset of some fields of knowledge, less the field; a noun's key → class."""
        for synset in self.synsets.values():
            for symbol, key in synset.pointers:
                if symbol == ";c" and key in topics and len(synset.gloss.split()) > 2:
                    yield synset.key, topics[key], re.sub(r"^\(.*?\) ", "", synset.gloss)

    def kinds(self, kinds: Mapping[str, str]) -> Iterator[Row]:
        """The names of all that is below some nouns in the hierarchy; a noun's key → class.

        Nouns of `kinds` that are below others of them take theirs away.
        """
        for top, kind in kinds.items():
            for synset in self._under(top, set(kinds) - {top}):
                for word in synset.words:
                    yield synset.key, kind, word

    def _under(self, key: str, without: Collection[str]) -> Iterator[Synset]:
        seen, open_keys = {key}, [key]
        while open_keys:
            for below in self._below[open_keys.pop()]:
                if below not in seen and below not in without:
                    seen.add(below)
                    open_keys.append(below)
                    yield self.synsets[below]

    def noun(self, word: str, file: int) -> str:
        """The key of the first noun synset whose words in a file begin with `word`."""
        return next(
            s.key for s in self.synsets.values() if s.key[0] == "n" and s.file == file and s.words[0] == word
        )


def _parsed(line: str) -> Synset:
    """A line of a data file: see wndb(5WN)."""
    facts, gloss = line.split(" | ", 1)
    offset, file, part, count, *rest = facts.split(" ")
    words = rest[: 2 * int(count, 16) : 2]
    pointers = rest[2 * int(count, 16) + 1 :]
    number = int(rest[2 * int(count, 16)])
    return Synset(
        f"{part.replace('s', 'a')}{offset}",
        int(file),
        tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words),
        re.split(r';\s*"', gloss)[0].strip(),
        tuple((pointers[4 * i], pointers[4 * i + 2] + pointers[4 * i + 1]) for i in range(number)),
    )
