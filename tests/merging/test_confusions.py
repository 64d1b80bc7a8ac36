"""What samples were taken for: counted as a merge is evaluated, kept with it, gone with the next arrival."""

from __future__ import annotations

import json

import pytest
import torch
from classifiers import NAMES, inputs, made, tuned

import mingle
from mingle.io.files import CheckpointError
from mingle.merging.answers import Answers, Confusion


def test_answers_are_counted_by_task_and_by_pairs_of_classes():
    found = torch.tensor([0, 1, 1, 1, 0, 1])
    wanted, given = torch.tensor([0, 0, 2, 2, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 0])
    answers = Answers.of(["a", "b", "c"], found, wanted, given, ["x", "y"])
    assert answers.taken == {"a": 2, "b": 4, "c": 0}
    assert answers.confused == [
        Confusion("2", "y", 2, 3), Confusion("x", "y", 1, 2), Confusion("2", "x", 1, 3),
    ]  # fmt: skip
    assert Answers.read(json.loads(json.dumps(answers.noted()))) == answers


def test_only_the_worst_confusions_are_kept():
    wanted = torch.arange(20).repeat_interleave(torch.arange(20))
    kept = Answers.of(["a"], torch.zeros_like(wanted), wanted, wanted + 1, None).confused
    assert [(each.wanted, each.count) for each in kept] == [(str(n), n) for n in (19, 18, 17, 16, 15)]


def test_a_merger_keeps_them_of_its_last_evaluation_and_until_the_next_task(tmp_path):
    base = made("bert")
    merger = mingle.Merger(base, "average")
    suite = {}
    for number, names in enumerate(NAMES):
        merger.add(f"task {number}", tuned(base, names, number + 1), inputs(base))
        suite[f"task {number}"] = inputs(base) | {
            "labels": torch.zeros(len(next(iter(inputs(base).values()))), dtype=torch.int64)
        }
        if number == 0:
            merger.evaluate(suite)
            assert list(merger.answers) == ["task 0"]
            assert merger.answers["task 0"].taken == {"task 0": len(suite["task 0"]["labels"])}
    assert merger.answers == {}
    result = merger.evaluate(suite)
    count = len(suite["task 0"]["labels"])
    for name, answers in result.answers.items():
        assert sum(answers.taken.values()) == count
        wrong = sum(each.count for each in answers.confused)
        known = result.matrix[-1][result.tasks.index(name)]
        assert wrong == round(count * (1 - known / 100))  # of few classes, all pairs are kept
    merger.save_pretrained(tmp_path)
    assert mingle.Merger.from_pretrained(tmp_path).result() == result
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["answers"]["task 0"]["taken"] = 3
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"answers\.'task 0'\.taken: expected an object"):
        mingle.Merger.from_pretrained(tmp_path)
