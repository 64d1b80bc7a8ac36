"""The study of strangers: scores are those by which a merge sends samples to the base."""

from __future__ import annotations

import pytest
import strangers
import torch
from few_samples import draw_few
from routing_limit import told_router

from mingle import suites


def test_the_area_counts_pairs():
    high, low = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high.tolist() for b in low.tolist()]
    assert strangers.auroc(high, low) == pytest.approx(sum(pairs) / len(pairs))


def test_a_sample_goes_to_the_base_where_its_score_is_beyond_the_limit(monkeypatch):
    draw_few(monkeypatch)
    suite = suites.load("glyphs4", samples_per_class=1)
    first, *_, last = suite
    method, _, _ = told_router(suite, [first])
    for name in (first, last):
        scores = strangers.scored(method, suite, name)
        seen = method.moments(suite[name], method.router.read)
        gates = torch.cat([method.router.router.gates(moments) for moments in seen])
        assert torch.equal(scores > method.known.options.abstain, gates.sum(1) == 0)
    found = strangers.measure(suite)
    assert 50 < found["auroc"] <= 100
    assert found["known to the base"] < found["strangers to the base"] <= 100
