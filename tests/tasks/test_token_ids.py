"""Samples of tokens that a model cannot read are refused by name, before any heavy work."""

from __future__ import annotations

import pytest
import torch
from classifiers import made
from transformers import LlamaConfig, LlamaForCausalLM

import mingle


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def tokens(value=3, length=5, **edits):
    given = {"input_ids": torch.full((4, length), value), "attention_mask": torch.ones(4, length).long()}
    for name, entry in edits.items():
        given[name][2] = entry
    return given


REFUSED = [
    (tokens(input_ids=32), "input_ids: token 32 in row 2; the model knows tokens 0 to 31"),
    (tokens(input_ids=-1), "input_ids: token -1 in row 2"),
    (tokens(attention_mask=0), "attention_mask: row 2 has no token that counts"),
    (tokens(attention_mask=2), "attention_mask: 2 in row 2; expected 0 or 1"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=["high", "negative", "empty", "mask"])
@pytest.mark.parametrize("method", ["routed", "mingle"])
def test_tokens_that_a_decoder_does_not_know_are_refused(given, message, method):
    base = llama()
    merger = mingle.Merger(base, method)
    with pytest.raises(ValueError, match=message):
        merger.add("one", llama(), given)
    assert not merger.merged


def test_evaluation_and_prediction_refuse_them_too():
    base = made("bert")
    places = base.config.max_position_embeddings
    merger = mingle.Merger(base, "average")
    merger.add("one", base)
    strange = tokens(base.config.vocab_size)
    with pytest.raises(ValueError, match=f"token {base.config.vocab_size} in row 0"):
        merger.predict(strange)
    with pytest.raises(ValueError, match=f"token {base.config.vocab_size} in row 0"):
        merger.evaluate({"one": strange | {"labels": torch.zeros(4).long()}})
    with pytest.raises(ValueError, match=f"rows of {places + 1} tokens; the model has {places} places"):
        merger.predict(tokens(length=places + 1))
    merger.predict(tokens(length=places))
