"""Experts packed in one tensor are found by looking, whichever way round they are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    ConvBertConfig,
    ConvBertModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTModel,
)

import mingle
from mingle.nn.inject import find_weights
from mingle.nn.matrices import Layout, matrices, packed_experts

SIZES = dict(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=16,
)
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=3, **SIZES)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, **SIZES)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=3, num_experts_per_tok=2, **SIZES)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(num_local_experts=3, intermediate_size_mlp=12, **SIZES)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_of_published_architectures(kind):
    model = MODELS[kind]()
    found, state = packed_experts(model), model.state_dict()
    assert {name for name, tensor in state.items() if tensor.dim() == 3} == found.keys()
    assert len(found) == 4 and all(layout.experts == 3 for layout in found.values())
    for name, layout in found.items():
        parts = layout.split(name, state[name])
        assert [*parts] == [f"{name}.{i}" for i in range(3)]
        # gate and up together read the hidden states, down makes them again: [d_out, d_in]
        expected = (24, 8) if name.endswith("gate_up_proj") else (8, 12)
        assert all(part.shape == expected for part in parts.values())
        assert torch.equal(layout.joined(name, parts), state[name])
    assert matrices(model).keys() == found.keys() | {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize(
    "model",
    [
        ConvBertModel(
            ConvBertConfig(
                hidden_size=16,
                embedding_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                vocab_size=32,
            )
        ),
        ViTModel(
            ViTConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
        ),
    ],
    ids=["convolutions", "positions"],
)
def test_other_three_dimensional_tensors_are_not_experts(model):
    assert any(parameter.dim() == 3 for parameter in model.parameters())
    assert packed_experts(model) == {}


class ParallelExperts(nn.Module):
    def __init__(self, experts, d_out, d_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, d_out, d_in))
        self.bias = nn.Parameter(torch.randn(experts, 1, d_out))
        self.register_parameter("counts", nn.Parameter(torch.zeros(2, 2, 2, dtype=int), requires_grad=False))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_linear, self.output_linear = ParallelExperts(4, 6, 5), ParallelExperts(4, 5, 3)
        self.input_conv = nn.Conv1d(4, 4, 3)
        self.shared_experts = nn.Sequential(
            nn.Conv1d(4, 4, 3), layer := mingle.MingleLinear.from_linear(nn.Linear(5, 6))
        )
        layer.add_expert(torch.randn(2, 5), torch.randn(6, 2))


def test_of_a_made_up_architecture():
    assert packed_experts(Mixture()) == {
        "input_linear.weight": Layout(experts=4),
        "output_linear.weight": Layout(experts=4),
    }


def test_a_target_may_name_layers_packed_experts_or_both():
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12, mlp_only_layers=[0], **SIZES
        )
    )
    dense, packed = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.experts.down_proj"
    assert find_weights(model, ["down_proj"]) == {dense: Layout(), packed: Layout(experts=3)}
    assert find_weights(model, ["experts.down_proj"]) == {packed: Layout(experts=3)}
    assert find_weights(model, ["mlp.down_proj"]) == {dense: Layout()}
    with pytest.raises(ValueError, match="no Linear layer's name ends in 'downproj'; did you mean"):
        find_weights(model, ["experts.down_proj", "downproj"])
