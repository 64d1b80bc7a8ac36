"""MINGLE behind a router: its gates are factors of the router's posterior, and nothing else differs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_merges import NAMES, SETTINGS, same_bits
from tiny_decoders import merged as merged_decoder
from tiny_decoders import mixed

import mingle
from mingle.adaptation import input_directions
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.kernels.gated_experts import reference
from mingle.methods import mingle as mingle_method
from mingle.tasks import TaskData


def shifted(samples, i):
    """Samples that the task can be told by."""
    pixels = samples[i].inputs["pixel_values"] * (1, 0.4, 2)[i] + (0, 3, -3)[i]
    return TaskData({"pixel_values": pixels}, samples[i].shared, samples[i].labels)


def merge(base_model, tuned_states, samples, count=3, method="mingle-routed", **options):
    merger = mingle.Merger(base_model, method, **(SETTINGS | options))
    for i in range(count):
        seeds = shifted(samples, i)
        merger.add(NAMES[i], tuned_states[i], TaskData(seeds.inputs, seeds.shared))
    return merger


def logits(merger, data):
    with torch.no_grad():
        return merger.task.logits(merger.model, data)


def test_without_trust_it_is_mingle(base_model, tuned_states, samples):
    own = merge(base_model, tuned_states, samples, trust=0.0)
    plain = merge(base_model, tuned_states, samples, method="mingle")
    for name, tensor in plain.model.state_dict().items():  # gates apart are rounded in another order
        found = own.model.state_dict()[name]
        assert (found - tensor).norm() <= 1e-3 * tensor.norm(), name
    torch.testing.assert_close(logits(own, samples[1]), logits(plain, samples[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduce", ["sample", "token", "batch"])
@pytest.mark.parametrize("trust", [0.6, 1.0])
def test_gates_are_those_of_mingle_times_the_prior(base_model, tuned_states, samples, reduce, trust):
    merger = merge(base_model, tuned_states, samples, trust=trust, reduce=reduce)
    layer = merger.method.layers["encoder.layers.1.mlp.fc1"]
    data, seen = shifted(samples, 1), {}
    handle = layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    logits(merger, data)
    handle.remove()
    router = merger.method.router
    (moments,) = merger.method.moments(data, router.read)
    posterior = router.router.gates(moments)
    assert posterior.argmax(1).eq(1).all()
    own = reference.gate_values(seen["x"], *layer.all_gates(), reduce)
    gates = own * (1 - trust + trust * posterior)[:, None]
    expected = reference.gated_experts(seen["x"], layer.weight, layer.bias, layer.A, layer.B, gates)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)
    assert layer.given_gates is None


def test_new_gates_learn_behind_the_router(base_model, tuned_states, samples):
    """With full trust older experts are silent, so that the new gate learns as if it were alone."""
    options = {"trust": 1.0, "constraint": "none", "gate_init": "zeros", "seed": 3}
    both = merge(base_model, tuned_states, samples, count=2, **options)
    notes = [task.notes for task in both.merged]
    assert "routing reads" in notes[1][0] and not any("routing" in note for note in notes[0])
    data, gates = shifted(samples, 1), {}

    def note(layer, args):
        gates[layer] = layer.gates(args[0])[:, 0]

    handles = [layer.register_forward_pre_hook(note) for layer in both.method.layers.values()]
    logits(both, data)
    for handle in handles:
        handle.remove()
    for given in gates.values():
        assert given[:, 0].abs().max() < 1e-3 < given[:, 1].abs().max()


def test_what_the_router_looks_at_is_not_among_the_protected_directions(base_model, tuned_states, samples):
    """Its look passes the same samples through the base, beside the pass of the merged model."""
    merger = merge(base_model, tuned_states, samples, count=2, reduce="token")
    merger.method.router.read = (1,)  # its look passes through the layers of the first block
    data, given = shifted(samples, 1), {}

    def note(layer, args):  # the model's own pass is the last one that a layer sees
        given[layer] = args[0].flatten(0, -2).double()

    handles = [layer.register_forward_pre_hook(note) for layer in merger.method.layers.values()]
    with input_directions.collected(merger.method.layers) as seen:
        logits(merger, data)
    for handle in handles:
        handle.remove()
    for name, layer in merger.method.layers.items():
        x = given[layer]
        assert seen[name].count == len(x)
        torch.testing.assert_close(seen[name].statistic, x.mT @ x, rtol=1e-4, atol=1e-4)


def test_resuming_copying_and_pickling_keep_it(base_model, tuned_states, samples, tmp_path):
    whole = merge(base_model, tuned_states, samples)
    first = merge(base_model, tuned_states, samples, count=2)
    first.save_pretrained(tmp_path)
    again = mingle.Merger.from_pretrained(tmp_path)
    data = shifted(samples, 1)
    assert torch.equal(logits(again, data), logits(first, data))
    seeds = shifted(samples, 2)
    again.add(NAMES[2], tuned_states[2], TaskData(seeds.inputs, seeds.shared))
    same_bits(again.model.state_dict(), whole.model.state_dict())
    for model in (copy.deepcopy(whole.model), pickle.loads(pickle.dumps(whole.model))):
        with torch.no_grad():
            assert torch.equal(whole.task.logits(model, data), logits(again, data))


def test_it_finds_tasks_as_routed_does(base_model, tuned_states, samples):
    own = merge(base_model, tuned_states, samples)
    routed = mingle.Merger(base_model, "routed", rank=4)
    for i in range(3):
        routed.add(NAMES[i], tuned_states[i], shifted(samples, i))
    for i in range(3):
        data = shifted(samples, i)
        assert torch.equal(own.method.route(data), routed.method.route(data))
        assert own.method.route(data).eq(i).double().mean() > 0.9


def test_a_merge_that_fails_leaves_the_router_as_it_was(base_model, tuned_states, samples, monkeypatch):
    merger = merge(base_model, tuned_states, samples, count=1)
    data = shifted(samples, 0)
    before = logits(merger, data)

    def fails(*_, **__):
        raise AdaptationDiverged("on purpose")

    monkeypatch.setattr(mingle_method, "adapt_gates", fails)
    with pytest.raises(AdaptationDiverged):
        merger.add("two", tuned_states[1], shifted(samples, 1))
    assert torch.equal(logits(merger, data), before)
    assert len(merger.method.known.features) == 1
    empty = mingle.Merger(base_model, "mingle-routed", **SETTINGS)
    with pytest.raises(AdaptationDiverged):
        empty.add("one", tuned_states[0], data)
    assert torch.equal(logits(empty, data), empty.task.logits(base_model, data).detach())


def test_a_decoder_decides_on_its_prompt():
    merger = merged_decoder("llama", "mingle-routed")
    model, inputs = merger.model, mixed("llama")
    with_cache = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=True)
    without = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    alone = model.generate(
        **{key: value[1:2] for key, value in inputs.items()}, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(alone[0], with_cache[1, : alone.shape[1]])


def test_folded_gates_are_the_means_of_what_it_uses(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, trust=1.0)
    data = shifted(samples, 1)
    folded = merger.method.folded(1, TaskData(data.inputs, data.shared))
    for gates in folded.gates.values():
        assert gates[[0, 2]].abs().max() < 1e-2 * gates[1].abs()


def test_bad_options_are_refused(base_model):
    for trust in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"trust={trust}"):
            mingle.Merger(base_model, "mingle-routed", trust=trust)
