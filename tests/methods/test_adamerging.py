"""Layer-wise AdaMerging: the coefficients it learns, and what happens where it cannot learn."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from small_merges import NAMES, add

import mingle
from mingle.adaptation.batches import Share, shuffled_batches
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.methods.adamerging import learn_coefficients
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

SETTINGS = dict(steps=6, lr=0.02, batch_size=8)


def merger_of(base_model, tuned, samples, count, **options):
    merger = mingle.Merger(base_model, "adamerging", **(SETTINGS | options))
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def tower(merger):
    return {name: tensor.clone() for name, tensor in merger.model.vision_model.state_dict().items()}


def plain_coefficients(model, theta, delta, data, seed, steps, lr, batch_size, init):
    """Adam written out, the gradient of each coefficient as ⟨∂L/∂W, Δ⟩; everything in float64."""
    coefficients = dict.fromkeys(theta, init)
    first, second = dict.fromkeys(theta, 0.0), dict.fromkeys(theta, 0.0)
    batches = shuffled_batches(len(data), batch_size, torch.Generator().manual_seed(seed))
    for t, index in zip(range(1, steps + 1), batches, strict=False):
        model.vision_model.load_state_dict({k: theta[k] + coefficients[k] * delta[k] for k in theta})
        model.zero_grad()
        p = torch.softmax(ClipTask().logits(model, data.select(index)), -1)
        (-(p * p.log()).sum(-1).mean()).backward()
        for k, parameter in model.vision_model.named_parameters():
            g = float((parameter.grad * delta[k]).sum())
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.999 * second[k] + 0.001 * g * g
            step = lr * first[k] / (1 - 0.9**t) / ((second[k] / (1 - 0.999**t)) ** 0.5 + 1e-8)
            coefficients[k] = min(max(coefficients[k] - step, 0.0), 1.0)
    return coefficients


@pytest.mark.parametrize("init", [0.3, 0.95])
def test_against_a_plain_recomputation(base_model, tuned_states, samples, init):
    # In float64: key biases have no gradient but rounding errors, which Adam would take for one in float32.
    model = copy.deepcopy(base_model).double()
    samples = [
        TaskData({"pixel_values": data.inputs["pixel_values"].double()}, data.shared) for data in samples
    ]
    merger = merger_of(model, tuned_states, samples, 3, init=init)
    base = {k: v.clone() for k, v in model.vision_model.state_dict().items()}
    theta, ends = base, 0
    for i, state in enumerate(tuned_states):
        delta = {k: state[k].double() - base[k] for k in base}
        learnt = plain_coefficients(
            model, theta, delta, samples[i], zlib.crc32(f"0/{i}".encode()), **SETTINGS, init=init
        )
        assert len(set(learnt.values())) > 10
        ends += sum(c == 1 for c in learnt.values())
        theta = {k: theta[k] + learnt[k] * delta[k] for k in base}
    assert (ends > 0) == (init == 0.95)  # some coefficients reach the end of the interval
    for k, tensor in tower(merger).items():
        assert (tensor - theta[k]).norm() <= 1e-5 * (theta[k] - base[k]).norm(), k


def test_it_lowers_the_entropy_and_leaves_all_else_alone(base_model, tuned_states, samples):
    merger = merger_of(base_model, tuned_states, samples, 1, steps=0)
    report = add(merger, 1, tuned_states, samples)
    assert report.trace.loss == []
    merger = merger_of(base_model, tuned_states, samples, 1, steps=60, batch_size=24)
    seen = []
    report = merger.add(
        "two", tuned_states[1], TaskData(samples[1].inputs, samples[1].shared), on_step=seen.append
    )
    assert report.trace.loss[-1] < report.trace.loss[0]
    assert [progress.step for progress in seen] == list(range(1, 61))
    assert [progress.loss for progress in seen] == report.trace.loss
    assert all(parameter.grad is None for parameter in merger.model.parameters())
    outside = {k: v for k, v in base_model.state_dict().items() if not k.startswith("vision_model.")}
    assert all(torch.equal(merger.model.state_dict()[k], v) for k, v in outside.items())


def test_resumed_merges_give_the_same_bits(base_model, tuned_states, samples, tmp_path):
    whole = tower(merger_of(base_model, tuned_states, samples, 3))
    merger_of(base_model, tuned_states, samples, 2).save_pretrained(tmp_path)
    merger = mingle.Merger.from_pretrained(tmp_path)
    add(merger, 2, tuned_states, samples)
    assert all(torch.equal(tensor, whole[k]) for k, tensor in tower(merger).items())


def test_a_task_equal_to_the_base_is_skipped(base_model, tuned_states, samples):
    merger = merger_of(base_model, tuned_states, samples, 1)
    before = tower(merger)
    report = merger.add("same", base_model, TaskData(samples[1].inputs, samples[1].shared))
    assert "nothing was merged" in report.skipped
    assert all(torch.equal(tensor, before[k]) for k, tensor in tower(merger).items())


def test_divergence_leaves_the_merger_as_it_was(base_model, tuned_states, samples):
    merger = merger_of(base_model, tuned_states, samples, 1)
    before = tower(merger)
    broken = {k: torch.full_like(v, 1e30) for k, v in tuned_states[1].items()}
    with pytest.raises(AdaptationDiverged, match="3 steps"):
        merger.add("two", broken, TaskData(samples[1].inputs, samples[1].shared))
    assert all(torch.equal(tensor, before[k]) for k, tensor in tower(merger).items())
    assert merger.task_names == NAMES[:1]


def test_single_steps_that_are_not_finite_are_left_out():
    """Two bad steps in a row, then good ones: only the good ones count."""
    calls = []

    def loss(coefficients, index):
        calls.append(coefficients.detach().clone())
        return (coefficients * (torch.nan if len(calls) in (2, 3) else 1.0)).sum()

    batches = [[Share(torch.arange(4), 1.0)]] * 5
    learnt, trace = learn_coefficients(loss, torch.tensor([0.3, 0.9]), batches, 0.1)
    assert torch.equal(calls[1], calls[3])
    assert not torch.equal(calls[0], calls[1])
    assert sum(value != value for value in trace.loss) == 2
    torch.testing.assert_close(learnt, torch.tensor([0.0, 0.6]))


def test_it_needs_seeds(base_model, tuned_states):
    with pytest.raises(ValueError, match="needs seed samples"):
        mingle.Merger(base_model, "adamerging").add("one", tuned_states[0])
