"""The study of routing: a router that is told of tasks without experts answers as that of a merge."""

from __future__ import annotations

import pytest
import routing_limit
from few_samples import draw_few

from mingle import suites
from mingle.merging.merger import Merger
from mingle.runs.settings import for_suite


def test_tasks_are_found_as_in_a_merge(monkeypatch):
    draw_few(monkeypatch)
    suite = suites.load("glyphs4", samples_per_class=1)
    names = list(suite)[:2]
    found = routing_limit.measure(suite, names)
    merger = Merger(suite.base, "routed", **for_suite("routed", suite, {}))
    for name in names:
        merger.add(name, suite.expert(name), suite.seeds(name))
    for place, name in enumerate(names):
        right = float((merger.method.route(suite[name]) == place).double().mean())
        assert found["tasks"][name] == pytest.approx(100 * right)
    assert found["right"] == pytest.approx(sum(found["tasks"].values()) / 2)
    assert found["seeds"] == {name: len(suite.seeds(name)) for name in names}
    assert found["right"] > 60
