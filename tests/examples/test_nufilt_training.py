"""The measurement of NUFILT's training: its peer is the method, and no wrong answer gets a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from mingle.bench.decomposition.cases import ExpertCase, LayerShape
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS
from mingle.methods import nufilt
from mingle.methods.nufilt import NufiltOptions

SCRIPT = Path(__file__).parents[2] / "examples/studies/nufilt_training.py"
CPU = torch.device("cpu")
TOY = ExpertCase("toy", "a toy", (LayerShape(24, 20, 2), LayerShape(40, 20, 1)), earlier=0)
OPTIONS = NufiltOptions(r_p=6, r_v=3, r_l=4, steps=6)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nufilt_training", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def plan(script):
    return script.NufiltPlan(OPTIONS, rounds=2, peer_steps=2)


def test_the_layers_of_the_case(script):
    assert [(shape.m, shape.n, shape.count) for shape in script.CASE.shapes] == [
        (768, 768, 48),
        (3072, 768, 12),
    ]


def test_a_run_is_plain_data_with_equal_rounds(script, plan):
    results = script.run(TOY, plan, CPU)
    assert json.loads(json.dumps(results)) == results
    (case,) = results["cases"]
    assert case["facts"]["layers"] == 3
    for name, steps in ((OURS, 6), (script.PUBLISHED, 2)):
        found = by_name(case)[name]
        assert found["status"] == "ok" and found["repetitions"] == 2 and found["steps_in_a_row"] == steps
        assert (
            set(found["errors"]) == {"24×20", "40×20"} and max(found["errors"].values()) <= found["tolerance"]
        )
    (target,) = results["targets"]
    assert target["met"] == (by_name(case)[script.PUBLISHED]["round_ratio"] >= target["ratio"] == 10)


def test_contenders_train_what_the_method_trains(script):
    layers, _ = script.make(TOY, OPTIONS, CPU, seed=3)
    deltas, merged = (
        {f"layer {i}": getattr(layer, part) for i, layer in enumerate(layers)} for part in ("delta", "merged")
    )
    expected = nufilt.updates(deltas, merged, OPTIONS, 3)
    for contender in (script.ours, script.train):
        for i, (layer, (A, B)) in enumerate(
            zip(layers, contender(layers, OPTIONS.steps, OPTIONS.lr), strict=True)
        ):
            torch.testing.assert_close(
                nufilt.filtered(layer.delta, layer.old, A, B), expected[f"layer {i}"], rtol=1e-4, atol=1e-8
            )


@pytest.mark.parametrize("attribute", ["ours", "train"])
def test_a_wrong_answer_gets_no_time(script, plan, monkeypatch, attribute):
    right = getattr(script, attribute)

    def wrong(layers, steps, lr):
        exact = layers[0].delta.dtype == torch.float64
        return [(A, B if exact else 1.01 * B) for A, B in right(layers, steps, lr)]

    monkeypatch.setattr(script, attribute, wrong)
    results = script.run(TOY, plan, CPU)
    name = OURS if attribute == "ours" else script.PUBLISHED
    found = by_name(results["cases"][0])[name]
    assert found["status"] == "wrong" and "median" not in found
    assert results["targets"] == []
