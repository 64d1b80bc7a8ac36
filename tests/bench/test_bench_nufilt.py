"""The NUFILT benchmark: its peer is the method, and no wrong answer gets a time."""

from __future__ import annotations

import json

import pytest
import torch

from mingle.bench import nufilt as bench
from mingle.bench.decomposition.cases import ExpertCase, LayerShape
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS
from mingle.bench.nufilt import PUBLISHED, NufiltPlan
from mingle.methods import nufilt
from mingle.methods.nufilt import NufiltOptions

CPU = torch.device("cpu")
TOY = ExpertCase("toy", "a toy", (LayerShape(24, 20, 2), LayerShape(40, 20, 1)), earlier=0)
PLAN = NufiltPlan(NufiltOptions(r_p=6, r_v=3, r_l=4, steps=6), rounds=2, peer_steps=2)


def test_the_layers_of_the_case():
    assert [(shape.m, shape.n, shape.count) for shape in bench.CASE.shapes] == [
        (768, 768, 48),
        (3072, 768, 12),
    ]


def test_a_run_is_plain_data_with_equal_rounds():
    results = bench.run(TOY, PLAN, CPU)
    assert json.loads(json.dumps(results)) == results
    (case,) = results["cases"]
    assert case["facts"]["layers"] == 3
    for name, steps in ((OURS, 6), (PUBLISHED, 2)):
        found = by_name(case)[name]
        assert found["status"] == "ok" and found["repetitions"] == 2 and found["steps_in_a_row"] == steps
        assert (
            set(found["errors"]) == {"24×20", "40×20"} and max(found["errors"].values()) <= found["tolerance"]
        )
    (target,) = results["targets"]
    assert target["met"] == (by_name(case)[PUBLISHED]["round_ratio"] >= target["ratio"] == 10)


def test_contenders_train_what_the_method_trains():
    layers, _ = bench.make(TOY, PLAN.options, CPU, seed=3)
    deltas, merged = (
        {f"layer {i}": getattr(layer, part) for i, layer in enumerate(layers)} for part in ("delta", "merged")
    )
    expected = nufilt.updates(deltas, merged, PLAN.options, 3)
    for contender in (bench.ours, bench.train):
        for i, (layer, (A, B)) in enumerate(
            zip(layers, contender(layers, PLAN.options.steps, PLAN.options.lr), strict=True)
        ):
            torch.testing.assert_close(
                nufilt.filtered(layer.delta, layer.old, A, B), expected[f"layer {i}"], rtol=1e-4, atol=1e-8
            )


@pytest.mark.parametrize("name", [OURS, PUBLISHED])
def test_a_wrong_answer_gets_no_time(monkeypatch, name):
    attribute = "ours" if name == OURS else "train"
    right = getattr(bench, attribute)

    def wrong(layers, steps, lr):
        exact = layers[0].delta.dtype == torch.float64
        return [(A, B if exact else 1.01 * B) for A, B in right(layers, steps, lr)]

    monkeypatch.setattr(bench, attribute, wrong)
    results = bench.run(TOY, PLAN, CPU)
    found = by_name(results["cases"][0])[name]
    assert found["status"] == "wrong" and "median" not in found
    assert results["targets"] == []
