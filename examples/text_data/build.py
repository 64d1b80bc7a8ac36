"""Build the data of the suites ``texts8`` and ``texts-tuning``: short English texts and their classes.

Everything comes from free sources, which pip and apt fetch into a folder (on Debian bookworm, after
``apt-get update``).  The result is the same on every machine that finds the same versions.

    python examples/text_data/build.py runs/text_sources
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tasks
from licences import licences
from sources import Row, Sources, fetch

from mingle.io.files import sha256, write_json, write_text
from mingle.suites.texts.corpus import DATA

#: of a task, the test texts that are wanted beside `SEEDS_PER_CLASS` for every class
TEST_TEXTS, SEEDS_PER_CLASS = 330, 5
#: of a class: the share of its texts that the test part may take, and the most and fewest training texts
TEST_SHARE, MOST, FEWEST = 0.4, 240, 30
#: texts that a group gives to a class at most
PER_GROUP = 2
#: words of a text at most: longer ones, which are few, would only cost time
WORDS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sources", type=Path, help="folder of the sources, which is filled where they are missing"
    )
    args = parser.parse_args()
    versions = fetch(args.sources)
    sources = Sources(args.sources)
    taken: set[str] = set()
    suites = {
        "texts8": built(tasks.texts8(sources), taken),
        "texts-tuning": built(tasks.tuning(sources), taken),
    }
    DATA.mkdir(exist_ok=True)
    text = json.dumps(suites, ensure_ascii=False, separators=(",", ":"))
    (DATA / "texts.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))
    write_text(DATA / "LICENSES.txt", licences(args.sources))
    files = [DATA / name for name in ("texts.json.xz", "LICENSES.txt")]
    write_json(
        DATA / "manifest.json",
        {
            "command": "python examples/text_data/build.py runs/text_sources",
            "sources": versions,
            "files": {path.name: sha256(path) for path in files},
            "texts": {
                suite: {
                    name: {part: sum(map(len, task[part])) for part in ("train", "test")}
                    for name, task in found.items()
                }
                for suite, found in suites.items()
            },
        },
    )


def built(found: dict[str, Callable[[], Iterable[Row]]], taken: set[str]) -> dict[str, Any]:
    """The parts of every task: sorted classes, and by class their training texts and their test texts.

    Args:
        found: task → its rows.
        taken: the texts of tasks of other suites, as `folded`, which are left out;
            those of these tasks are added.
    """
    suite = {name: divided(name, list(rows()), taken) for name, rows in found.items()}
    for name, task in suite.items():
        for part in ("train", "test"):
            taken |= {folded(text) for texts in task[part] for text in texts}
            print(
                f"{name:12}{part:6}",
                *(f"{c} {len(t)}" for c, t in zip(task["classes"], task[part], strict=True)),
            )
    return suite


def divided(name: str, rows: list[Row], taken: set[str]) -> dict[str, Any]:
    """One task's classes and texts.

    Texts that stand for two classes are left out.  Groups of rows go to the test part, in an order drawn from
    the task's name, as long as one of their classes lacks test texts; the others go to the training part.
    """
    classes: defaultdict[str, set[str]] = defaultdict(set)
    for _, label, text in rows:
        classes[folded(text)].add(label)
    groups: defaultdict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    seen = set(taken)
    for group, label, text in rows:
        key = folded(text)
        if key not in seen and len(classes[key]) == 1 and key and len(text.split()) <= WORDS:
            seen.add(key)
            groups[group][key] = label, " ".join(text.split())
    sizes = Counter(label for group in groups.values() for label, _ in group.values())
    names = sorted(label for label, size in sizes.items() if (1 - TEST_SHARE) * size >= FEWEST)
    each = -(-TEST_TEXTS // len(names)) + SEEDS_PER_CLASS
    wanted = {label: min(each, int(TEST_SHARE * sizes[label])) for label in names}
    parts: dict[str, dict[str, list[str]]] = {
        part: {label: [] for label in names} for part in ("train", "test")
    }
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"{name}/{group}".encode()).digest()):
        own = [(label, text) for label, text in groups[group].values() if label in wanted]
        part = "test" if any(len(parts["test"][label]) < wanted[label] for label, _ in own) else "train"
        limit = wanted if part == "test" else dict.fromkeys(names, MOST)
        given: Counter[str] = Counter()
        for label, text in own:
            if len(parts[part][label]) < limit[label] and given[label] < PER_GROUP:
                parts[part][label].append(text)
                given[label] += 1
    return {
        "classes": names,
        **{part: [sorted(texts) for texts in own.values()] for part, own in parts.items()},
    }


def folded(text: str) -> str:
    """A text as an uncased tokenizer sees it: no capitals, no accents, one kind of space."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"\s+", " ", plain.casefold()).strip()


if __name__ == "__main__":
    main()
