"""Small models in folders, to be merged from file to file."""

from __future__ import annotations

import copy

import pytest
import torch
from bare_methods import tuned_states
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)


class Interrupted(BaseException):
    """What no code here expects, as a signal is."""


def models(kind, **more):
    """A model of a kind, with the same weights each time; `more` is of the kind's configuration."""
    torch.manual_seed(0)
    if kind == "mixtral":
        sizes = SIZES | dict(intermediate_size=24, num_key_value_heads=2, num_local_experts=3)
        return MixtralForCausalLM(MixtralConfig(**sizes, **more)).bfloat16()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=24, num_labels=3))
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True)).bfloat16()


def save_tuned(place, model, names, shards):
    """Fine-tuned versions of a model, each in shards of its own size."""
    for name, state, shard in zip(names, tuned_states(model), shards, strict=False):
        tuned = copy.deepcopy(model)
        tuned.load_state_dict(state)
        tuned.save_pretrained(place / name, max_shard_size=shard)


def save_gpt2_and_adapter(place):
    """A base, and ``one``, an adapter for it."""
    peft = pytest.importorskip("peft")
    models("gpt2").save_pretrained(place / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    peft.get_peft_model(models("gpt2"), config).save_pretrained(place / "one")
