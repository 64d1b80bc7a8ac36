"""A base's folder, a fine-tuned model of it as tensors, and the configuration of both."""

from __future__ import annotations

import json

import pytest
import torch


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
