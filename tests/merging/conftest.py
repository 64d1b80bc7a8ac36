"""Models to be merged: in folders, as tensors, and from file to file."""

from __future__ import annotations

import json

import pytest
import torch
from few_samples import few_images  # noqa: F401
from streamed_merges import folders_of

from mingle.io import lazy_tensors
from mingle.merging import streamed


@pytest.fixture
def base(base_folder):
    return base_folder


@pytest.fixture
def tuned(base_model):
    """The whole base model with another vision tower, as a state dict."""
    generator = torch.Generator().manual_seed(11)
    state = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    return {
        name: t + 0.02 * torch.randn(t.shape, generator=generator) if name.startswith("vision_model.") else t
        for name, t in state.items()
    }


@pytest.fixture
def clip_config(base):
    return json.loads((base / "config.json").read_text())


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A base and three fine-tuned models in bfloat16, to be read only."""
    return folders_of("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def parts(monkeypatch):
    """Parts so small that there are a dozen, and blocks of which large tensors have several."""
    monkeypatch.setattr(streamed, "PART_BYTES", 6000)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 200)
