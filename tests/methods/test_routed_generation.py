"""Routed language models decide on prompts, and the decision follows its sequences wherever they go."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from tiny_decoders import CONFIGS, DECODERS, PAIRS, built, merged, mixed, prompts, tuned

import mingle
from mingle.io.manifest import MANIFEST
from mingle.nn import kv_cache
from mingle.tasks import TaskData
from mingle.tasks.masks import prompt

#: of the prompts that `mixed` makes, one row each
GATES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])


def routed(name):
    """A merged model, and one of its layers by whose gates decisions are seen."""
    merger = merged(name, "routed")
    return merger.model, next(reversed(merger.method.layers.values()))


def cache_of(output):
    return next(value for value in output.values() if kv_cache.cache_in([value]) is not None)


def argument(output):
    return next(key for key, value in output.items() if kv_cache.cache_in([value]) is not None)


def prefilled(name):
    """The name of the cache's argument, and a cache with the prompts that `mixed` makes."""
    model, _ = routed(name)
    with torch.no_grad():
        output = model(**mixed(name), use_cache=True)
    return argument(output), cache_of(output)


def decided(name, cache, key, rows):
    """The gates of a step of one token with a cache."""
    model, layer = routed(name)
    with torch.no_grad():
        model(torch.full((rows, 1), 40), **{key: cache})
    return layer.given_gates


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_has_the_gates_of_its_prompt(name):
    key, cache = prefilled(name)
    assert torch.equal(decided(name, cache, key, 4), GATES)
    assert torch.equal(decided(name, copy.deepcopy(cache), key, 4), GATES)
    assert torch.equal(decided(name, pickle.loads(pickle.dumps(cache)), key, 4), GATES)


def test_gates_follow_the_rows_of_a_cache():
    key, cache = prefilled("llama")
    order = torch.tensor([3, 3, 0, 2])
    cache.reorder_cache(order)
    assert torch.equal(decided("llama", cache, key, 4), GATES[order])
    cache.batch_repeat_interleave(2)
    assert torch.equal(decided("llama", cache, key, 8), GATES[order].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([7, 0]))
    assert torch.equal(decided("llama", cache, key, 2), GATES[[2, 3]])


def test_a_shortened_cache_keeps_its_decision_and_an_emptied_one_does_not():
    key, cache = prefilled("llama")
    cache.crop(-2)
    assert torch.equal(decided("llama", cache, key, 4), GATES)
    emptied = copy.deepcopy(cache)
    emptied.crop(-emptied.get_seq_length())
    cache.reset()
    assert kv_cache.kept(cache) is None
    assert kv_cache.kept(emptied) is None


@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache"])
def test_a_cache_of_the_users_is_decided_on_once(kind):
    model, layer = routed("gemma2")
    config = model.config
    made = {"max_cache_len": 24} if kind == "StaticCache" else {}
    cache = getattr(transformers, kind)(config=config, **made)
    key, _ = prefilled("gemma2")
    with torch.no_grad():
        model(**mixed("gemma2"), **{key: cache})
    assert isinstance(cache, getattr(transformers, kind))
    assert type(cache).__name__ == kind
    assert torch.equal(decided("gemma2", cache, key, 4), GATES)
    cache.reset()
    with torch.no_grad():
        model(**{k: v.flip(0) for k, v in mixed("gemma2").items()}, **{key: cache})
    assert torch.equal(layer.given_gates, GATES.flip(0))


def test_two_generations_in_turn_do_not_mix():
    model, _ = routed("qwen3")
    whole = [prompts("qwen3", task, 2, seed=4) for task in range(2)]
    expected = [model.generate(**inputs, max_new_tokens=5, do_sample=False) for inputs in whole]
    sequences = [inputs["input_ids"] for inputs in whole]
    masks, kept = [inputs["attention_mask"] for inputs in whole], [{}, {}]
    for _ in range(5):
        for i in range(2):
            mask = masks[i]
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            new = sequences[i] if not kept[i] else sequences[i][:, -1:]
            with torch.no_grad():
                output = model(
                    new,
                    attention_mask=mask,
                    position_ids=positions[:, -new.shape[1] :],
                    use_cache=True,
                    **kept[i],
                )
            kept[i] = {argument(output): cache_of(output)}
            sequences[i] = torch.cat([sequences[i], output.logits[:, -1:].argmax(-1)], 1)
            masks[i] = torch.nn.functional.pad(mask, (0, 1), value=1)
    for found, wanted in zip(sequences, expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_cache_that_another_model_filled_is_refused():
    model, _ = routed("llama")
    with torch.no_grad():
        output = merged("llama", "routed").base(**mixed("llama"), use_cache=True)
    with pytest.raises(ValueError, match="a key-value cache that was not filled by this model"):
        model(torch.full((4, 1), 40), **{argument(output): cache_of(output)})


def test_without_a_cache_only_generate_knows_the_prompt():
    model, layer = routed("llama")
    first, second = (prompts("llama", task, 2, seed=4)["input_ids"][:1] for task in range(2))
    long = torch.cat([first[:, -3:], second.repeat(1, 3)], 1)
    with torch.no_grad():
        model(long, use_cache=False)
    assert torch.equal(layer.given_gates, GATES[1:2])
    with torch.no_grad(), prompt(3):
        model(long, use_cache=False)
    assert torch.equal(layer.given_gates, GATES[:1])


def test_a_part_of_a_prompt_is_not_decided_on():
    model, _ = routed("llama")
    with pytest.raises(ValueError, match="the first 4 of the 9 tokens of a prompt"):
        model.generate(**mixed("llama"), max_new_tokens=3, prefill_chunk_size=4)


def test_given_answers_are_not_part_of_the_decision():
    merger = merged("llama", "routed")
    _, layer = routed("llama")
    first, second = (prompts("llama", task, 2, seed=4)["input_ids"][:1] for task in range(2))
    ids = torch.cat([first[:, -3:], second.repeat(1, 3)], 1)
    answers = (torch.arange(ids.shape[1]) >= 3).long()[None]
    with torch.no_grad():
        merger.task.logits(merger.model, merger.task.data({"input_ids": ids, "answer_mask": answers}))
    assert torch.equal(layer.given_gates, GATES[:1])


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_either_side_changes_neither_decisions_nor_logits(name):
    merger, (model, layer) = merged(name, "routed"), routed(name)
    left = merger.task.data(mixed(name))
    order = left.inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    right = TaskData({key: tensor.gather(1, order) for key, tensor in left.inputs.items()})
    wide = TaskData({key: torch.nn.functional.pad(tensor, (3, 2)) for key, tensor in left.inputs.items()})
    results = []
    for data in (left, right, wide):
        with torch.no_grad():
            logits = merger.task.logits(model, data)
        assert torch.equal(layer.given_gates, GATES)
        results.append(logits[merger.task.valid(data)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_a_decoder_has_the_gates_of_the_encoding_that_it_reads(name):
    model, layer = routed(name)
    batches = [mixed(name), {key: tensor.flip(0) for key, tensor in mixed(name).items()}]
    with torch.no_grad():
        encoded = [model.get_encoder()(**inputs) for inputs in batches]
        wanted = []
        for inputs in batches:
            model(**inputs, decoder_input_ids=torch.zeros(4, 1, dtype=torch.long))
            wanted.append(layer.given_gates.clone())
    assert not torch.equal(*wanted)
    kind = type(encoded[0])
    rows = [0, 1, 2, 3], [2, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    for i in (0, 1, 0):
        for chosen in rows:
            states = kind(last_hidden_state=encoded[i].last_hidden_state[list(chosen)])
            with torch.no_grad():
                model(
                    encoder_outputs=states,
                    attention_mask=batches[i]["attention_mask"][list(chosen)],
                    decoder_input_ids=torch.zeros(len(chosen), 1, dtype=torch.long),
                )
            assert torch.equal(layer.given_gates, wanted[i][list(chosen)])


def test_encodings_from_elsewhere_are_refused():
    model, _ = routed("mt5")
    states = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=torch.randn(3, 9, 32))
    with torch.no_grad():
        model(**mixed("mt5"), decoder_input_ids=torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="3 encoded samples, of which 3 are not from this model's encoder"):
        model(encoder_outputs=states, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("name", ["llama", "mt5"])
def test_copies_and_pickles_generate_alike(name):
    model, _ = routed(name)
    how = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(**mixed(name), **how)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for kept in (True, False):
            assert torch.equal(other.generate(**mixed(name), **how, use_cache=kept), expected)
        if name == "llama":
            assert other.generate.model is other


def test_a_model_of_few_blocks_is_read_at_those_it_has(tmp_path):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    base = built(config)
    merger = mingle.Merger(base, "routed", rank=4)
    assert len(merger.method.router.sites) == 1
    with pytest.raises(ValueError, match="the model has 1 blocks, so 0 is the deepest"):
        mingle.Merger(base, "routed", rank=4, depths=(0, 1))
    assert len(merged("llama", "routed").method.router.sites) == 3
    merger.add("a", tuned(base, 1), prompts("llama", 0))
    merger.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["options"]["depths"] is None
    assert mingle.Merger.from_pretrained(tmp_path).options == merger.options


def test_the_windows_of_an_image_share_its_gates():
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.SwinForImageClassification(config).eval()
    merger = mingle.Merger(base, "routed", rank=4, abstain=None)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 6, 3, 32, 32, generator=generator) + torch.tensor([0, 3]).view(2, 1, 1, 1, 1)
    for task in range(2):
        merger.add(f"task {task}", tuned(base, task), {"pixel_values": pixels[task]})
    model = merger.model_for("task 0")
    with torch.no_grad():
        together = model(pixel_values=torch.cat([pixels[0, :2], pixels[1, :2]])).logits
        alone = torch.cat(
            [model(pixel_values=pixels[i, k : k + 1]).logits for i, k in ((0, 0), (0, 1), (1, 0), (1, 1))]
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
