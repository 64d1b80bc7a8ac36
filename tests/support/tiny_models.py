"""The sizes of the small CLIP that tests make, and a student of it."""

from __future__ import annotations

import copy

import torch

from mingle import MingleLinear, inject

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=64,
    max_position_embeddings=8,
)


def student(
    base_model: torch.nn.Module, targets: tuple[str, ...] = ("q_proj", "fc1")
) -> tuple[torch.nn.Module, dict[str, MingleLinear]]:
    """A frozen copy of the base model with a random expert of rank 4 in every target layer."""
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.get_submodule("vision_model"), targets)
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1)
    return model, layers
