"""Merged decoders generate with a key-value cache what they generate without one, token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_decoders import CONFIGS, DECODERS, PAIRS, merged, mixed

TOKENS = 6
WAYS = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3),
    "all beams": dict(num_beams=4, num_return_sequences=3),
    "many samples": dict(do_sample=True, top_k=20, num_return_sequences=3),
}
#: Mixtral has no linear layers outside of its attention
CASES = [
    (name, method)
    for name in CONFIGS
    for method in ("mingle", "mingle-light", "wemoe", "routed")
    if (name, method) != ("mixtral", "wemoe")
]


def generated(model, inputs, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(**inputs, **(dict(max_new_tokens=TOKENS, do_sample=False) | how))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_cache_changes_no_token(name, method):
    merger = merged(name, method)
    model = merger.model
    assert not torch.equal(generated(model, mixed(name)), generated(merger.base, mixed(name)))
    for way, how in WAYS.items():
        with_cache, without = (generated(model, mixed(name), **how, use_cache=kept) for kept in (True, False))
        assert torch.equal(with_cache, without), way


@pytest.mark.parametrize("method", ["mingle", "routed"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_static_cache_changes_no_token(name, method):
    model = merged(name, method).model
    for how in ({}, dict(num_beams=2)):
        expected = generated(model, mixed(name), **how, use_cache=False)
        assert torch.equal(generated(model, mixed(name), **how, cache_implementation="static"), expected)


@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case[0] in DECODERS])
def test_a_continued_sequence_is_that_of_one_call(name, method):
    model, inputs = merged(name, method).model, mixed(name)
    whole = generated(model, inputs, max_new_tokens=2 * TOKENS, use_cache=False)
    first = generated(model, inputs, return_dict_in_generate=True)
    argument = "cache" if "cache" in first else "past_key_values"  # before transformers 5.20
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, TOKENS), value=1)
    for kept in (copy.deepcopy(first[argument]), first[argument]):
        given = {"input_ids": first.sequences, "attention_mask": mask, argument: kept}
        assert torch.equal(generated(model, given), whole)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_a_batch_and_its_padding_change_no_sequence(name, method):
    model, inputs = merged(name, method).model, mixed(name)
    together = generated(model, inputs)
    for row in range(len(together)):
        own = inputs["attention_mask"][row].bool()
        alone = {key: tensor[row : row + 1, own] for key, tensor in inputs.items()}
        answer = generated(model, alone)
        start = 1 if name in PAIRS else int(own.sum())
        assert torch.equal(answer[0, start:], together[row, -TOKENS:]), row
