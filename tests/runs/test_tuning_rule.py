"""The rule that chooses settings: accuracy among those that forget little, then the least forgetting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mingle.runs.tuning import Tuning, choose, combinations

RESULTS = Path(__file__).parents[2] / "bench/results/cpu"


def row(name, acc, bwt):
    return {"options": {"name": name}, "acc": acc, "bwt": bwt}


def test_all_combinations_the_first_option_slowest():
    assert combinations({"a": (1, 2), "b": (3, 4)}) == [
        {"a": 1, "b": 3},
        {"a": 1, "b": 4},
        {"a": 2, "b": 3},
        {"a": 2, "b": 4},
    ]


def test_of_settings_within_half_a_point_the_one_that_forgets_least_is_chosen():
    rows = [
        row("best", [70.0, 72.0], [-1.5, -1.7]),
        row("near", [70.4, 70.8], [-0.4, -0.6]),
        row("far", [69.0, 70.0], [0.0, 0.0]),
        row("forgets", [80.0, 80.0], [-2.5, -2.5]),
        row("diverged", [], []),
    ]
    assert choose(rows) == {"name": "near"}


def test_where_all_settings_forget_the_best_accuracy_decides():
    assert choose([row("a", [60.0], [-9.0]), row("b", [61.0], [-11.0])]) == {"name": "b"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-tuning.json")), ids=lambda path: path.stem)
def test_the_committed_choices_are_those_of_the_rule(path):
    for method in json.loads(path.read_text())["methods"].values():
        assert choose(method["rows"]) == method["chosen"]


def test_a_tuning_measures_every_combination_of_every_method(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Tuning,
        "measure",
        lambda self, method, options: row(f"{method} {options['lr']}", [options["lr"]], [0]),
    )
    found = Tuning("glyphs4", tmp_path).run({"wemoe": {"lr": (1, 5)}, "mingle": {"lr": (2,)}})
    assert {name: method["chosen"]["name"] for name, method in found["methods"].items()} == {
        "wemoe": "wemoe 5",
        "mingle": "mingle 2",
    }
    assert found["suite"] == "glyphs4" and found["protocol"] == "strict"
