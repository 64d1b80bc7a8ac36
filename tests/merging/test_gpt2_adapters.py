"""LoRA adapters of GPT-2, whose weights are transposed, as fine-tuned models."""

from __future__ import annotations

import copy

import pytest
import torch
from bare_methods import BareTask
from transformers import GPT2Config, GPT2LMHeadModel

from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.finetuned import FineTuned

peft = pytest.importorskip("peft")


def gpt2(width=8):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=2, vocab_size=16, n_positions=8)).eval()


def adapted(base, folder):
    """PEFT's model with its adapter saved in `folder`; attn.c_proj is square."""
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(folder)
    return model


def test_an_adapter_is_the_model_that_peft_makes_of_it(tmp_path):
    base = gpt2()
    expected = adapted(base, tmp_path).merge_and_unload().state_dict()
    found = FineTuned(tmp_path, base, BareTask()).tensors()
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(found[name], tensor)}
    assert changed == {
        f"transformer.h.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_an_adapter_of_another_width_is_refused_by_its_layer(tmp_path):
    adapted(gpt2(width=16), tmp_path)
    message = r"layer 'transformer\.h\.0\.attn\.c_attn' is \[48, 16\], in the base \[24, 8\]"
    with pytest.raises(IncompatibleModel, match=message):
        FineTuned(tmp_path, gpt2(), BareTask())
