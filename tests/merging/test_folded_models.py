"""Gated merges exported for one task: experts folded into plain weights by gates that are constant."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_merges import GATED, ROUTED, answers, merger_of
from small_merges import SETTINGS, add
from transformers import CLIPModel

import mingle
from mingle.tasks import TaskData

CONSTANT = GATED | {"mingle": SETTINGS, "wemoe": {"steps": 2, "rank": 4, "later_rank": 2}}


@pytest.mark.parametrize("method", CONSTANT)
@pytest.mark.parametrize("given", [False, True], ids=["alone", "means"])
def test_a_folded_model_answers_as_the_merged_one_with_these_gates(
    base_folder, tuned_states, samples, tmp_path, method, given
):
    merger = mingle.Merger(base_folder, method, **CONSTANT[method])
    for i in range(2):
        add(merger, i, tuned_states, samples)
    seeds = TaskData(samples[1].inputs, samples[1].shared)
    merger.export(tmp_path / "two", "two", seed_data=seeds if given else None)
    model, report = CLIPModel.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    gates = merger.method.folded(1, seeds if given else None).gates
    means = given and merger.method.folds_by_means
    assert all(torch.equal(gate, gate.new_tensor([0, 1])) for gate in gates.values()) != means
    held = copy.deepcopy(merger.model)
    for module in held.modules():  # routers would overrule what is given
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    for name, gate in gates.items():
        held.vision_model.get_submodule(name).given_gates = gate
    torch.testing.assert_close(answers(model.eval(), samples), answers(held, samples), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "A model for the task two" in card
    assert ("means over 24 samples" if means else "1 for the task's own expert and 0 for all others") in card


def test_mean_gates_are_those_of_the_formula(base_model, tuned_states, samples, tmp_path):
    """For gates of a sample's mean, the mean over samples is the gate of the mean of all samples' means."""
    merger = merger_of(base_model, "mingle", tuned_states, samples)
    name = "encoder.layers.1.mlp.fc1"
    layer, seen = merger.method.layers[name], []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answers(merger.model, samples)
    handle.remove()
    weight, bias = layer.all_gates()
    expected = weight @ seen[0].mean((0, 1)) + bias
    found = merger.method.folded(0, TaskData(samples[0].inputs, samples[0].shared)).gates[name]
    torch.testing.assert_close(found, expected)


def test_half_precision_is_folded_in_full(base_model, tuned_states, samples, tmp_path):
    base = copy.deepcopy(base_model).to(torch.bfloat16)
    merger = mingle.Merger(base, "routed", **ROUTED)
    halves = TaskData({"pixel_values": samples[0].inputs["pixel_values"].bfloat16()}, samples[0].shared)
    merger.add("one", tuned_states[0], halves)
    merger.export(tmp_path / "out", "one")
    model = CLIPModel.from_pretrained(tmp_path / "out")
    for name, layer in merger.method.layers.items():
        expected = layer.weight.float() + layer.B[0].float() @ layer.A[0].float()
        assert torch.equal(model.vision_model.get_submodule(name).weight, expected.bfloat16())


def test_requests_that_make_no_sense_are_refused(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "mingle", tuned_states, samples)
    seeds = TaskData(samples[0].inputs, samples[0].shared)
    with pytest.raises(ValueError, match="'three' is not among the merged ones"):
        merger.export(tmp_path / "out", "three")
    with pytest.raises(ValueError, match="no task was named"):
        merger.export(tmp_path / "out", seed_data=seeds)
    with pytest.raises(ValueError, match="need 'pixel_values'"):
        merger.export(tmp_path / "out", "one", seed_data={})
    assert not list(tmp_path.iterdir())
