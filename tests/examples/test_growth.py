"""The growth curves: their exponents, what many merges keep, and what is written."""

from __future__ import annotations

import growth
import pytest
import torch

from mingle.bench import record
from mingle.bench.measure import OURS
from mingle.bench.merges import contenders
from mingle.bench.merges.cases import PUBLISHED

pytestmark = pytest.mark.slow  # the plain run has siblings of these

CPU = torch.device("cpu")


def test_exponents_are_slopes():
    values = [1, 2, 4, 8, 16]
    assert growth.exponents(values, [3.0 * v**1.5 for v in values]) == pytest.approx(
        {"all": 1.5, "upper": 1.5}
    )
    flat_then_linear = growth.exponents(values, [4.0, 4.0, 4.0, 8.0, 16.0])
    assert flat_then_linear["upper"] == pytest.approx(1.0) and 0 < flat_then_linear["all"] < 1


def test_many_merges_keep_experts_gates_and_bases_and_nothing_else():
    bystander = torch.eye(3).to_sparse()  # has no storage to ask for
    found = growth.kept(CPU, 6, "batch")
    assert bystander.is_sparse and found["ok"] and len(found["held_bytes"]) == 6
    assert found["accounted_bytes"][-1] == pytest.approx(6 * found["accounted_bytes"][0], rel=0.1)


def test_a_leak_is_seen(monkeypatch):
    leaked, add = [], contenders.OurMerge.add
    monkeypatch.setattr(
        contenders.OurMerge,
        "add",
        lambda self, *rest: (leaked.append(torch.zeros(10_000)), add(self, *rest))[1],
    )
    assert not growth.kept(CPU, 4, "batch")["ok"]


def test_growth_is_written_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(growth, "QUICK", {"tasks": (1, 2), "width": (32, 64)})
    assert growth.main(["--quick", "--out", str(tmp_path)]) == 0
    found = record.read(tmp_path / "growth.json")
    assert found["kept"]["ok"] and [case["facts"]["values"] for case in found["cases"]] == [[1, 2], [32, 64]]
    for case in found["cases"]:
        points = [(row["name"], row["at"]) for row in case["rows"]]
        assert points == [(name, value) for value in case["facts"]["values"] for name in (OURS, PUBLISHED)]
        assert all(row["median"] > 0 and row["peak_bytes"] > 0 for row in case["rows"])
        assert case["exponents"].keys() == {OURS, PUBLISHED}
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "MB in tensors beyond the base" in capsys.readouterr().out
