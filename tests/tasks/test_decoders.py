"""Merged decoders generate with a key-value cache what they generate without one, token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_decoders import CONFIGS, DECODERS, PAIRS, merged, mixed, tuned

from mingle.adaptation import input_directions
from mingle.adaptation.losses import distillation_loss
from mingle.tasks import TaskData

TOKENS = 6
WAYS = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3),
    "all beams": dict(num_beams=4, num_return_sequences=3),
    "many samples": dict(do_sample=True, top_k=20, num_return_sequences=3),
}
#: methods whose gates are per token too, and one whose are also decided on the prompt
SLOW = ("mingle-light", "wemoe", "mingle-routed")
#: Mixtral has no linear layers outside of its attention
CASES = [
    pytest.param(name, method, marks=[pytest.mark.slow] * (method in SLOW and name != "llama"))
    for name in CONFIGS
    for method in ("mingle", "routed", *SLOW)
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


@pytest.mark.parametrize(("name", "method"), [case for case in CASES if case.values[0] in DECODERS])
def test_a_continued_sequence_is_that_of_one_call(name, method):
    model, inputs = merged(name, method).model, mixed(name)
    whole = generated(model, inputs, max_new_tokens=2 * TOKENS, use_cache=False)
    first = generated(model, inputs, return_dict_in_generate=True)
    argument = "cache" if "cache" in first else "past_key_values"  # before transformers 5.20
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, TOKENS), value=1)
    for kept in (copy.deepcopy(first[argument]), first[argument]):
        given = {"input_ids": first.sequences, "attention_mask": mask, argument: kept}
        assert torch.equal(generated(model, given), whole)


@pytest.mark.parametrize("method", ["mingle", "routed"])
def test_tokens_that_are_looked_up_in_the_prompt_are_those_of_plain_generation(method):
    model = merged("llama", method).model
    for row in range(4):
        inputs = {key: tensor[row : row + 1].repeat(1, 2) for key, tensor in mixed("llama").items()}
        inputs["attention_mask"][:] = 1
        looked_up = generated(model, inputs, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up, generated(model, inputs, use_cache=False))


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


def padded_otherwise(name, data):
    """The same samples, padded on the left, on the right, on both sides, and in another batch."""
    inputs = data.inputs
    own = [key for key in inputs if not key.startswith("decoder")]
    order = inputs["attention_mask"].argsort(dim=1, stable=True, descending=name in DECODERS)
    yield {key: inputs[key].gather(1, order) if key in own else inputs[key] for key in inputs}
    yield {key: torch.nn.functional.pad(inputs[key], (3, 2)) if key in own else inputs[key] for key in inputs}
    yield {key: torch.cat([tensor, tensor.flip(1 if key in own else 0)]) for key, tensor in inputs.items()}


@pytest.mark.parametrize("method", ["mingle", "wemoe"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mixtral"])
def test_padding_changes_neither_answers_nor_gradients_nor_directions(name, method):
    merger = merged(name, method)
    task, layers = merger.task, merger.method.layers
    learning = merger.method.routers if method == "wemoe" else layers
    seeds = task.prepared(lambda: tuned(merger.base, 0), task.data(mixed(name)))
    results = []
    for inputs in (seeds.inputs, *padded_otherwise(name, seeds)):
        data = TaskData(inputs)
        merger.model.zero_grad()
        with input_directions.collected(layers) as seen:
            logits = task.logits(merger.model, data)
        valid = task.valid(data)
        first = valid.clone()
        first[len(seeds) :] = False
        distillation_loss(logits, torch.zeros_like(logits), 2.0, first).backward()
        directions = {key: value.statistic for key, value in seen.items()} if len(data) == len(seeds) else {}
        gradients = {key: layer.gate_weight.grad.clone() for key, layer in learning.items()}
        results.append((logits[first].detach(), gradients, directions))
    for answers, gradients, directions in results[1:]:
        torch.testing.assert_close(answers, results[0][0], rtol=1e-3, atol=1e-4)
        for found, expected in ((gradients, results[0][1]), (directions, results[0][2])):
            for key, tensor in found.items():
                error = (tensor - expected[key]).norm()
                assert error < 1e-3 * expected[key].norm() + 1e-12, key
