"""The study of several processes: bytes by its formulas are those of a merge, and of committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import several_processes as study
from small_merges import merge

from mingle import ranks

RESULTS = Path(__file__).parents[2] / "bench/results/cpu/several-processes"


def test_the_gradients_of_a_step_have_as_many_bytes_as_the_formula_says(
    base_model, tuned_states, samples, monkeypatch
):
    given: list[int] = []
    monkeypatch.setattr(ranks, "sum_", study._counting(ranks.sum_, given))
    merge(base_model, tuned_states, samples, count=1, steps=3)
    shape = study.Shape(2, ((32, (32, 32, 32)), (32, (32,)), (32, (64,)), (64, (32,))), 17, 0)
    assert given == [shape.gradient_bytes()] * 3
    assert shape.layers == 12


def test_the_committed_table_is_that_of_the_committed_results():
    results = json.loads((RESULTS / "results.json").read_text())
    assert study.table(results) == (RESULTS / "table.md").read_text()
    assert results["measured"]["gradient_bytes"] == study.MEASURED.gradient_bytes()
    for name, shape in study.MODELS.items():
        for row in results["model"][name]:
            assert row == pytest.approx(study.predicted(shape, row["gpus"]))
