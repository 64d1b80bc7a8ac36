"""The course of a merge as little plain data: thinned, by block, and without what JSON cannot hold."""

from __future__ import annotations

import pytest
from fabricated_runs import LAYERS, trace

from mingle.adaptation.trace import AdaptTrace
from mingle.runs import course
from mingle.runs.loop import MergeStep

TASKS = ["a", "b", "c"]


def test_series_are_means_over_blocks_at_few_steps_from_the_first_to_the_last() -> None:
    values = [float(step) for step in range(100)]
    layers = {"x.0.q": values, "x.0.k": [value + 2 for value in values], "head": [float("nan")] * 100}
    found = AdaptTrace(values, layers, {})
    metadata: dict[str, object] = {}
    course.note(metadata, MergeStep("a", 1.5, 0.5, found))
    noted = metadata["course"]["tasks"]["a"]  # type: ignore[index]
    assert noted["steps"] == 100 and len(noted["loss"]) == 24
    assert (noted["loss"][0], noted["loss"][-1]) == (0.0, 99.0)
    assert noted["interference"].keys() == {"x.0", "head"} and noted["strength"] == {}
    assert (noted["interference"]["x.0"][0], noted["interference"]["x.0"][-1]) == (1.0, 100.0)
    assert noted["interference"]["head"] == [None] * 24


def test_notes_of_earlier_tasks_stay_and_gates_go_with_the_next() -> None:
    metadata: dict[str, object] = {"course": "of another kind"}
    course.note(metadata, MergeStep("a", 1.5, 0.5, None))
    course.note_gates(metadata, {"tasks": ["a"]})
    assert metadata == {"course": {"tasks": {"a": {}}, "gates": {"tasks": ["a"]}}}
    course.note_gates(metadata, None)
    course.note(metadata, MergeStep("b", 1.5, 0.5, AdaptTrace([1.0])))
    assert metadata["course"] == {  # type: ignore[comparison-overlap]
        "tasks": {"a": {}, "b": {"steps": 1, "loss": [1.0], "interference": {}, "strength": {}}}
    }


def test_a_task_that_leaves_takes_its_notes_along_and_all_gates() -> None:
    metadata: dict[str, object] = {"course": {"tasks": {"a": {}, "b": {}}, "gates": {"tasks": ["a", "b"]}}}
    course.forget(metadata, "a")
    assert metadata == {"course": {"tasks": {"b": {}}}}
    for other in ({}, {"course": "of another kind"}, {"course": {}}):
        unchanged = dict(other)
        course.forget(unchanged, "a")
        assert unchanged == other


def test_the_gates_of_a_trace_are_summed_up() -> None:
    found = course.of_trace(trace(TASKS))
    gates = found["gates"]
    assert gates["mean"] == [[1.0, -0.25, -0.25], [-0.25, 1.0, -0.25], [-0.25, -0.25, 1.0]]
    assert gates["own"] == [[1.25] * 3] * len(LAYERS) and gates["experts"] == TASKS


def test_a_skipped_task_has_no_expert() -> None:
    given = trace(TASKS)
    given["loss"][1] = []
    given["interference"][1] = given["strength"][1] = {}
    given["gates"] = [[[row[0], row[2]] for row in layers] for layers in given["gates"]]
    found = course.of_trace(given)
    assert found["tasks"]["b"] == {} and found["gates"]["experts"] == ["a", "c"]
    assert found["gates"]["own"][0] == [1.25, 1.25]


@pytest.mark.parametrize("layer", ["encoder.layers.11.mlp.fc1", "encoder.layers.11.self_attn.q_proj"])
def test_the_block_of_a_layer(layer: str) -> None:
    assert course.block_of(layer) == "encoder.layers.11"
    assert course.block_of("head.dense") == "head.dense"
