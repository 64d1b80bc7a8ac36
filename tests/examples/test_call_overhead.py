"""The study of what a call costs: all it compares compute the layer, and are timed."""

from __future__ import annotations

import call_overhead

from mingle.bench import record
from mingle.bench.judge import by_name


def test_all_contestants_compute_the_layer(monkeypatch, tmp_path, capsys):
    cases = tuple(case for case in call_overhead.CASES if case.experts == 2)
    assert len(cases) == 6
    monkeypatch.setattr(call_overhead, "CASES", cases)
    monkeypatch.setattr(call_overhead, "SECONDS", 0.0)
    monkeypatch.setattr(call_overhead, "CALLS", 2)
    assert call_overhead.main(["--out", str(tmp_path / "overhead.json")]) == 0
    for case in record.read(tmp_path / "overhead.json")["cases"]:
        rows = by_name(case)
        assert len(rows) == 5
        assert all(row["status"] == "ok" and row["median"] > 0 for row in rows.values()), rows
        assert case["overhead"] == rows["mingle"]["median"] - rows["nn.Linear"]["median"]
        assert case["over_by_hand"] == rows["mingle"]["median"] / rows["operators by hand"]["median"]
    assert "over nn.Linear" in capsys.readouterr().out


def test_a_wrong_contestant_is_found(monkeypatch, tmp_path):
    plain = call_overhead.operators
    monkeypatch.setattr(
        call_overhead, "operators", lambda *args: (plain(*args)[0] * 1.001, *plain(*args)[1:])
    )
    monkeypatch.setattr(call_overhead, "SECONDS", 0.0)
    rows = by_name(call_overhead.measure(call_overhead.CallCase(1, "sample", True), 0.0))
    assert {name for name, row in rows.items() if row["status"] == "wrong"} == {
        "operators alone",
        "operators by hand",
    }
