"""Folders of fine-tuned models, and how they are refused."""

from __future__ import annotations

import json

import pytest
import torch
from merge_files import merge_file
from safetensors.torch import save_file

import mingle
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.runs.check import check
from mingle.runs.config import load


def written(folder, tensors, config):
    """A folder in hub format from tensors and a configuration."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moved(tensors, seed=1, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def config_file(folder, base, experts, method="average"):
    return merge_file(folder, base, experts, method)


def refused(base, expert, message, tmp_path):
    """Refused by `check`, `merge` and `Merger.add` alike, with nothing written."""
    config = config_file(tmp_path, base, {"a": expert})
    for out in (None, tmp_path / "out"):
        with pytest.raises((IncompatibleModel, CheckpointError), match=message):
            check(load(config), out)
    assert not (tmp_path / "out").exists()
    with pytest.raises((IncompatibleModel, CheckpointError), match=message):
        mingle.Merger(base, "average").add("a", expert)
