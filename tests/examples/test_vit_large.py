"""The study of twenty ViT-L tasks, with a small tower: models are made, and merged both ways."""

from __future__ import annotations

import pytest
import vit_large


@pytest.mark.parametrize("kind", ["whole", "files"])
def test_memory_is_measured_after_every_task(kind, tmp_path, monkeypatch):
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, patch_size=112)
    monkeypatch.setattr(vit_large, "TOWER", small)
    vit_large.make(tmp_path, 2)
    rows = list(vit_large.measured(kind, tmp_path, tasks=3, images=1))
    assert [row["task"] for row in rows] == [1, 2, 3]
    assert 1 << 27 < rows[0]["peak"] <= rows[1]["peak"] <= rows[2]["peak"] < 1 << 35
