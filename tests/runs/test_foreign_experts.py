"""Models that are not fine-tuned from the base are refused before any of their weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_merge import TinyMerge

from mingle.io.safetensors import CheckpointReader

NORM = "vision_model.post_layernorm.bias"
OLD, NEW = "vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.encoder.layers.0.mlp.fc1_weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tiny(tmp_path: Path) -> TinyMerge:
    return TinyMerge(tmp_path)


def refusal(tiny: TinyMerge, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Tensors], object]) -> str:
    """What a merge into a new folder says once a tensor of b is another; nothing was read or written."""
    path = tiny.inputs / "b" / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    monkeypatch.setattr(CheckpointReader, "tensor", lambda *_, **__: pytest.fail("reads a tensor"))
    assert tiny.merge(tiny.root / "new")() == 2
    assert not (tiny.root / "new").exists()
    said = " ".join(tiny.said.read_text().split())
    assert f"expert 'b' ({path.parent})" in said
    return said


def test_renamed_tensors_are_listed_as_missing_and_extra_with_the_closest_match_before_any_work(
    tiny: TinyMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(tiny, monkeypatch, lambda tensors: tensors.update({NEW: tensors.pop(OLD)}))
    old, new = OLD.removeprefix("vision_model."), NEW.removeprefix("vision_model.")
    assert f"1 missing: {old}; 1 extra: {new}; {old!r} may be {new!r}" in said


def test_tensors_of_other_shapes_are_listed_with_both_shapes_before_any_work(
    tiny: TinyMerge, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(tiny, monkeypatch, lambda tensors: tensors.update({NORM: torch.zeros(17)}))
    assert "1 of another shape: post_layernorm.bias [17] instead of [16]" in said
