"""Inputs that are made when they are asked for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")


from mingle.tasks import TaskData
from mingle.tasks.lazy import LazyInputs


def test_lazy_inputs_are_a_mapping():
    lazy = LazyInputs(
        ("a", "b"), lambda rows: {"a": torch.tensor(rows), "b": -torch.tensor(rows)}, torch.arange(9)
    )
    data = TaskData(lazy, {}, torch.arange(9) * 10, metric="spearman").select(torch.tensor([8, 2, 5]))
    assert len(data) == 3 and list(data.inputs) == ["a", "b"] and len(data.inputs) == 2
    assert data.inputs["b"].tolist() == [-8, -2, -5]
    moved = data.to(torch.device("cpu"))
    assert (moved.inputs["a"].tolist(), moved.labels.tolist(), moved.metric) == (
        [8, 2, 5],
        [80, 20, 50],
        "spearman",
    )
    assert [batch.inputs["a"].tolist() for batch in data.batches(2)] == [[8, 2], [5]]
