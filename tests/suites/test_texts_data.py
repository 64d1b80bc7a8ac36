"""The texts that ship: whole, free to pass on, and no test text was trained on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mingle.io.files import sha256
from mingle.suites import texts
from mingle.suites.texts.corpus import DATA, read_tasks

SCRIPTS = Path(__file__).parents[2] / "examples/text_data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
CLASSES = {
    "nouns": 23,
    "verbs": 15,
    "animals": 20,
    "packages": 20,
    "emoji": 9,
    "cities": 20,
    "feelings": 4,
    "languages": 20,
}


@pytest.fixture(scope="module")
def build():
    """The script that made the data."""
    siblings = {path.stem for path in SCRIPTS.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in siblings & set(sys.modules)}
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("text_data_build", SCRIPTS / "build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in siblings:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def both_parts(task):
    return [text for part in (task.train, task.test) for own in part for text in own]


def test_what_ships_is_what_the_manifest_says():
    assert {p.name for p in DATA.iterdir()} == {*MANIFEST["files"], "manifest.json"}
    assert {name: sha256(DATA / name) for name in MANIFEST["files"]} == MANIFEST["files"]
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 600_000
    for suite in texts.NAMES:
        counted = {
            name: {"train": sum(map(len, task.train)), "test": sum(map(len, task.test))}
            for name, task in read_tasks(suite).items()
        }
        assert counted == MANIFEST["texts"][suite]


def test_the_tasks_of_texts8_and_their_classes():
    tasks = read_tasks("texts8")
    assert {name: len(task.class_names) for name, task in tasks.items()} == CLASSES
    for task in tasks.values():
        assert len(set(task.class_names)) == len(task.class_names) == len(task.train) == len(task.test)


@pytest.mark.parametrize("suite", texts.NAMES)
def test_there_are_enough_texts_of_every_class(suite):
    for task in read_tasks(suite).values():
        assert sum(map(len, task.test)) >= 350
        assert all(len(own) >= 20 for own in (*task.train, *task.test)), task.name


@pytest.mark.parametrize("suite", texts.NAMES)
def test_no_test_text_was_trained_on_and_none_has_two_classes(suite, build):
    for task in read_tasks(suite).values():
        found = [build.folded(text) for text in both_parts(task)]
        assert len(set(found)) == len(found), task.name
        assert all(found), task.name


def test_tuning_tasks_share_no_text_with_the_suite(build):
    assert len(read_tasks("texts-tuning")) >= 5
    suite, tuning = (
        {build.folded(text) for task in read_tasks(name).values() for text in both_parts(task)}
        for name in ("texts8", "texts-tuning")
    )
    assert not suite & tuning


def test_every_task_has_a_source_and_every_source_a_licence():
    words = (DATA / "LICENSES.txt").read_text()
    head = words.split("Text 1")[0]
    for task in (*read_tasks("texts8"), *read_tasks("texts-tuning")):
        assert task in head
    for source, version in MANIFEST["sources"].items():
        assert source.startswith("Debian ") or version in head, source
    for licence in (
        "WordNet 3.0 Copyright 2006 by Princeton University",
        "UNICODE, INC. LICENSE AGREEMENT",
        "creativecommons.org/licenses/by/4.0",
        "Copyright (c) 2016 C.J. Hutto",
        "GNU LESSER GENERAL PUBLIC LICENSE",
    ):
        assert licence in words


def test_groups_stay_together_and_texts_of_two_classes_are_left_out(build, monkeypatch):
    monkeypatch.setattr(build, "FEWEST", 10)
    monkeypatch.setattr(build, "TEST_TEXTS", 20)
    rows = [(f"g{n // 2}", "odd" if n % 4 > 1 else "even", f"text {n}") for n in range(100)]
    rows += [
        ("h", "odd", "Café"),
        ("i", "even", "cafe"),
        ("j", "rare", "the only one"),
        ("k", "odd", "taken"),
    ]
    rows += [("l", "odd", "Text  0")]
    task = build.divided("task", rows, {"taken"})
    assert task["classes"] == ["even", "odd"]
    assert [len(own) for own in task["test"]] == [15, 15]  # half of 20, and 5 seeds
    parts = {part: {text for own in task[part] for text in own} for part in ("train", "test")}
    left_out = {"Café", "cafe", "text 0", "Text 0", "the only one", "taken"}
    assert not (parts["train"] | parts["test"]) & left_out
    group = {text: name for name, _, text in rows}
    assert not {group[text] for text in parts["train"]} & {group[text] for text in parts["test"]}


def test_a_line_of_wordnet(build):
    wordnet = sys.modules["wordnet"]
    line = (
        "00005930 03 n 02 dwarf 0 small_one(a) 1 002 @ 00004475 n 0000 + 01 a 0103 | atypically small; "
        'small as it is; "a dwarf"  '
    )
    synset = wordnet._parsed(line)
    assert synset == wordnet.Synset(
        "n00005930",
        3,
        ("dwarf", "small one"),
        "atypically small; small as it is",
        (("@", "n00004475"), ("+", "a01")),
    )


def test_rows_that_the_sources_give(build, tmp_path):
    files = {
        "Packages": (
            "Package: chess-data\nSource: chess (2.0)\nDescription: pieces\nSection: games\n"
            "Tag: game::board,\n implemented-in::c\n\n"
            "Package: chess-old\nSource: chess\nDescription: transitional package\nSection: games\n\n"
            "Package: mixed\nDescription: both\nTag: implemented-in::c, implemented-in::perl\nSection: misc\n"
        ),
        "unicode-data/usr/share/unicode/emoji/emoji-test.txt": (
            "# group: People & Body\n"
            "1 ; fully-qualified # x E4.0 woman singer\n"
            "1 ; fully-qualified # x E4.0 woman singer: dark skin tone\n"
            "1 ; unqualified # x E4.0 man\n"
            "# group: Component\n1 ; fully-qualified # x E1.0 red hair\n"
        ),
        "vaderSentiment/vaderSentiment/vader_lexicon.txt": (
            "hopeful\t2.3\t0.9\t[]\n:-)\t1.3\t0.9\t[]\nmeh\t-0.3\t1\t[]\n"
        ),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = build.Sources(tmp_path)
    assert list(sources.sections({"games": "game"})) == [("chess", "game", "pieces")]
    assert list(sources.implementations({"c": "C"})) == [("chess", "C", "pieces")]
    assert list(sources.emoji({"People & Body": "person"})) == [("singer", "person", "woman singer")]
    assert list(sources.feelings({"good": (2, 4), "bad": (-4, -0.1)})) == [
        ("hopef", "good", "hopeful"),
        ("meh", "bad", "meh"),
    ]
