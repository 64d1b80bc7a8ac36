"""Experts from saved PEFT adapters: they compute what PEFT computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_adapters import LAYERS, Net, adapted, edit_tensors, peft, randomize
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mingle
from mingle.io.files import CheckpointError

# peft warns about most of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)


PATTERNS: dict[str, Any] = dict(
    rank_pattern={r"blocks\.1\.fc.": 2, "bed": 7, "fc1": 3, "^embed": 5},
    alpha_pattern={"0.fc1": 2, "c1": 50, "fc1": 4, "fc2|embed": 3},
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(r=1, lora_alpha=-0.5),
        dict(r=20),  # above every layer's width
        dict(use_rslora=True),
        dict(target_modules=["blocks.1.fc2"]),
        PATTERNS,
        dict(PATTERNS, use_rslora=True),
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights="eva"),
        dict(init_lora_weights="orthogonal"),
        dict(init_lora_weights=False, lora_dropout=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduce", ["sample", "token"])
def test_computes_what_peft_computes(base, x, tmp_path, options, reduce):
    model = adapted(base, tmp_path, **options)
    expected, plain = model(x), base(x)
    layers = mingle.add_adapter(base, tmp_path, reduce=reduce)
    assert list(layers) == [name for name in LAYERS if name in layers]
    assert len(layers) == (1 if options.get("target_modules") else len(LAYERS))
    assert all(base.get_submodule(name) is layer and layer.reduce == reduce for name, layer in layers.items())
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(base(x), model.merge_and_unload()(x), rtol=0, atol=1e-6)


def test_mica_leaves_the_base_as_it_is(tmp_path):
    base, x = Net().eval(), torch.randn(3, 5, 6)
    expected = adapted(base, tmp_path, init_lora_weights="mica")(x)
    mingle.add_adapter(base, tmp_path)
    torch.testing.assert_close(base(x), expected, rtol=1e-6, atol=1e-6)


def test_on_a_transformers_model(tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    base, tokens = LlamaForCausalLM(config).eval(), torch.randint(32, (2, 7))
    model = adapted(
        base, tmp_path, target_modules="all-linear", task_type="CAUSAL_LM", rank_pattern={"q_proj": 2}
    )
    expected = model(tokens).logits
    experts = mingle.read_adapter(tmp_path)
    assert len(experts) == 14
    assert experts["model.layers.1.self_attn.q_proj"].A.shape == (2, 16)
    mingle.add_adapter(base, experts)
    torch.testing.assert_close(base(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_adapters_of_different_ranks_one_after_another(base, x, tmp_path):
    model = adapted(base, tmp_path, r=2, target_modules=["fc1", "embed"])
    model.add_adapter(
        "second", peft.LoraConfig(r=5, lora_alpha=3, target_modules=["fc1", "fc2"], use_rslora=True)
    )
    randomize(model, "second", seed=6)
    model.base_model.set_adapter(["default", "second"])
    model.save_pretrained(tmp_path)
    expected = model(x)
    first = mingle.add_adapter(base, tmp_path)
    second = mingle.add_adapter(base, tmp_path / "second", reduce="token")
    torch.testing.assert_close(base(x), expected, rtol=0, atol=1e-6)
    shared = second["blocks.0.fc1"]
    assert shared is first["blocks.0.fc1"]
    assert shared.reduce == "sample" and second["blocks.0.fc2"].reduce == "token"
    assert (shared.num_experts, shared.rank) == (2, 5)
    assert shared.gate_weight.shape == (1, 8) and shared.gate_weight.requires_grad
    assert shared.frozen_gate_bias.tolist() == [1.0]


def test_factors_are_used_as_they_are(base, tmp_path):
    adapted(base, tmp_path, use_rslora=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, expert in mingle.read_adapter(tmp_path).items():
        assert torch.equal(expert.A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(expert.B, stored[f"base_model.model.{name}.lora_B.weight"] * 3)  # 6 / √4


def test_half_precision_is_widened_before_it_is_scaled(base, tmp_path):
    adapted(base, tmp_path, r=3, lora_alpha=1)
    edit_tensors(
        tmp_path,
        lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}),
    )
    expert = mingle.read_adapter(tmp_path)["embed"]
    stored = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.embed.lora_B.weight"]
    assert expert.A.dtype == expert.B.dtype == torch.float32
    assert torch.equal(expert.B, stored.float() * (1 / 3))


def test_gate_bias(base, x, saved):
    plain, full = base(x), copy.deepcopy(base)
    mingle.add_adapter(full, saved)
    layers = mingle.add_adapter(base, saved, gate_bias=0.0)
    torch.testing.assert_close(base(x), plain)
    for layer in layers.values():
        layer.gate_bias.data.fill_(1.0)
    assert torch.equal(base(x), full(x))


def test_names_with_the_adapter_inside(base, saved):
    experts = mingle.read_adapter(saved)
    rename = lambda name: name.replace(".weight", ".default.weight")  # noqa: E731
    edit_tensors(
        saved, lambda tensors: [tensors.update({rename(name): tensors.pop(name)}) for name in list(tensors)]
    )
    assert all(torch.equal(expert.B, experts[name].B) for name, expert in mingle.read_adapter(saved).items())


def test_a_converted_pissa_adapter(base, x, tmp_path):
    base, x = base.float(), x.float()
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], init_lora_weights="pissa"),
    ).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomize(model)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    with pytest.raises(
        CheckpointError, match="init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"
    ):
        mingle.read_adapter(tmp_path / "plain")
    mingle.add_adapter(base, tmp_path / "converted")
    torch.testing.assert_close(base(x), model(x), rtol=1e-5, atol=1e-5)


def test_fan_in_fan_out_describes_the_base_only(tmp_path):
    """GPT-2 keeps its weights transposed; its adapters' factors are those of any layer."""
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8)).eval()
    tokens = torch.randint(16, (2, 5))
    targets = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square
    model = adapted(base, tmp_path, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    name = "transformer.h.0.attn.c_attn"
    expert = mingle.read_adapter(tmp_path)[name]
    torch.testing.assert_close(
        expert.delta().T, model.base_model.model.get_submodule(name).get_delta_weight("default")
    )
    expected = model(tokens).logits
    assert (expected - base(tokens).logits).abs().max() > 1e-3
    layers = mingle.add_adapter(base, tmp_path)
    assert len(layers) == 8
    torch.testing.assert_close(base(tokens).logits, expected, rtol=1e-6, atol=1e-6)


def test_an_expert_that_does_not_fit_a_conv1d():
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8))
    expert = mingle.LowRankExpert(A=torch.zeros(2, 24), B=torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"expected \[r, 8\] and \[24, r\]"):
        mingle.add_adapter(base, {"transformer.h.0.attn.c_attn": expert})
