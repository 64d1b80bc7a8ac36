"""The analysis of interference: parts of a merged model give what the whole gave when it had only these
parts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from few_samples import draw_few

from mingle import suites
from mingle.merging.evaluate import accuracy
from mingle.merging.merger import Merger

SCRIPT = Path(__file__).parents[2] / "examples/studies/interference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("interference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("protocol", ["strict", pytest.param("official", marks=pytest.mark.slow)])
def test_parts_of_a_merge(script, protocol, monkeypatch):
    draw_few(monkeypatch)
    suite = suites.load("glyphs4", protocol=protocol, samples_per_class=1)
    names = list(suite)[:2]
    samples = {name: suite[name].select(torch.arange(40)) for name in names}
    reduce = {"strict": "sample", "official": "batch"}[protocol]
    merger = Merger(suite.base, "mingle", rank=8, lr=4e-3, steps=8, k=2, reduce=reduce)
    for name in names:
        merger.add(name, suite.expert(name), suite.seeds(name))
        result = merger.evaluate(samples)
    first, second = script.measure(merger, samples)
    for row, name in ((first, names[0]), (second, names[1])):
        assert row["task"] == name
        assert row["accuracy"]["base"] == accuracy(merger.task, merger.base, samples[name])
    assert [first["accuracy"]["all"], second["accuracy"]["all"]] == result.matrix[1]
    assert first["accuracy"]["it and older"] == first["accuracy"]["its expert"] == result.matrix[0][0]
    assert first["accuracy"]["it and newer"] == first["accuracy"]["all"]
    assert second["accuracy"]["it and older"] == second["accuracy"]["all"]
    assert set(first["gates"]) == {"own", "newer"} and set(second["gates"]) == {"own", "older"}
    assert first["protected"] == 0 < second["protected"] < 1
    assert all(layer.given_gates is None for layer in merger.method.layers.values())
    mean = script.mean([first, second])
    assert mean["accuracy"]["all"] == pytest.approx(result.acc)
    assert mean["gates"]["older"] == second["gates"]["older"]
