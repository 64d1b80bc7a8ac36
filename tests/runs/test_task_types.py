"""Merges of classifiers from a YAML file: the key task_type, and what is found where it is missing."""

from __future__ import annotations

import json
import logging

import pytest
from classifiers import NAMES, made, tuned
from merge_files import merge_file

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.options import OptionError
from mingle.runs import config
from mingle.runs.check import check
from mingle.tasks.kinds import kind_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base without a head, and two classifiers fine-tuned from it."""
    folder, classifier = tmp_path_factory.mktemp("models"), made("bert")
    classifier.bert.save_pretrained(folder / "base")
    for number, names in enumerate(NAMES):
        tuned(classifier, names, number + 1).save_pretrained(folder / f"task{number}")
    return folder


def experts(folders):
    return {f"task{number}": folders / f"task{number}" for number in range(2)}


def test_a_headless_base_serves_classifiers_where_the_file_says_so(folders, tmp_path, capsys):
    path = merge_file(
        tmp_path, folders / "base", experts(folders), "average", task_type="text-classification"
    )
    assert main(["check", str(path)]) == 0
    assert main(["merge", str(path), "--out", str(tmp_path / "merged")]) == 0
    assert main(["merge", str(path), "--out", str(tmp_path / "merged")]) == 0  # there is nothing left to do
    manifest = json.loads((tmp_path / "merged/manifest.json").read_text())
    assert manifest["task_type"] == "text-classification"
    assert [task["labels"] for task in manifest["tasks"]] == [list(names) for names in NAMES]
    other = merge_file(tmp_path, folders / "base", experts(folders), "average", task_type="sentence-encoder")
    with pytest.raises(CheckpointError, match="task type: 'text-classification' there, 'sentence-enc"):
        check(config.load(other), tmp_path / "merged")
    merger = mingle.Merger.from_pretrained(tmp_path / "merged")
    assert merger.model_for("task1").config.id2label == dict(enumerate(NAMES[1]))
    assert main(["inspect", str(tmp_path / "merged")]) == 0
    arguments = ["export", str(tmp_path / "merged"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "each task has a head of its own; name one of task0, task1" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*arguments, "--task", "task1"]) == 0
    assert "now, task unknown" in (tmp_path / "out/README.md").read_text()


def test_a_base_that_two_kinds_would_take_is_named_with_both(folders, caplog):
    with caplog.at_level(logging.WARNING):
        assert kind_of(folders / "base") == "sentence-encoder"
    assert "task_type sentence-encoder, or text-classification where fine-tuned" in caplog.text
    caplog.clear()
    assert kind_of(folders / "task0") == "text-classification"
    assert not caplog.text


def test_an_unknown_task_type_is_named_with_the_file(folders, tmp_path):
    path = merge_file(tmp_path, folders / "base", experts(folders), "average", task_type="text-clasification")
    with pytest.raises(OptionError, match=r"merge\.yaml: .*did you mean 'text-classification'"):
        config.load(path)
