"""Batches of seed samples, and the teacher's answers for them."""

from __future__ import annotations

import torch
from tiny_models import student

from mingle.adaptation.batches import drawn, shuffled_batches
from mingle.adaptation.losses import distillation, entropy
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks.clip import ClipTask


def test_the_teacher_answers_only_for_samples_that_are_used(base_model, samples):
    asked, gates = [], []
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))

    def teacher(seeds):
        asked.append(seeds)
        all_images = samples[0].inputs["pixel_values"]
        places = [
            next(i for i, known in enumerate(all_images) if torch.equal(known, one))
            for one in seeds.inputs["pixel_values"]
        ]
        return logits[places]

    used, _ = drawn(24, 5, 3, torch.Generator().manual_seed(0))
    for answers in (lambda _: logits[used], teacher):
        model, layers = student(base_model)
        loss, config = distillation(answers, 2.0), AdaptConfig(steps=3, batch_size=5, lr=1e-2)
        adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
        gates.append(torch.cat([layer.gate_weight.flatten() for layer in layers.values()]))
    assert [len(seeds) for seeds in asked] == [15]
    assert torch.equal(*gates)
    config = AdaptConfig(steps=0)
    trace = adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator())
    assert trace.loss == [] and len(asked) == 1


def test_the_batches_are_those_that_all_samples_would_give(base_model, samples, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ClipTask,
        "logits",
        lambda self, model, data, real=ClipTask.logits: seen.append(data) or real(self, model, data),
    )
    model, layers = student(base_model)
    config = AdaptConfig(steps=3, batch_size=5)
    adapt_gates(ClipTask(), model, layers, samples[0], entropy, config, torch.Generator().manual_seed(3))
    batches = shuffled_batches(24, 5, torch.Generator().manual_seed(3))
    for data, index in zip(seen[-3:], batches, strict=False):
        assert torch.equal(data.inputs["pixel_values"], samples[0].inputs["pixel_values"][index])


def test_a_batch_in_several_passes_gives_the_step_of_the_whole_batch(base_model, samples, monkeypatch):
    seen, gates, losses = [], [], []
    monkeypatch.setattr(
        ClipTask,
        "logits",
        lambda self, model, data, real=ClipTask.logits: seen.append(len(data)) or real(self, model, data),
    )
    for at_once in (None, 2):
        model, layers = student(base_model)
        config = AdaptConfig(steps=4, batch_size=5, lr=1e-2, micro_batch_size=at_once)
        seen.clear()
        trace = adapt_gates(
            ClipTask(), model, layers, samples[0], entropy, config, torch.Generator().manual_seed(3)
        )
        assert seen[-3:] == [5, 5, 5] if at_once is None else seen[-6:] == [2, 2, 1, 2, 2, 1]
        gates.append(torch.cat([layer.gate_weight.flatten() for layer in layers.values()]))
        losses.append(torch.tensor(trace.loss))
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*losses)
    assert not torch.equal(gates[0], torch.zeros_like(gates[0]))


def test_batches_pass_through_all_samples_in_a_new_order():
    batches = shuffled_batches(10, 4, torch.Generator().manual_seed(0))
    taken = torch.cat([next(batches) for _ in range(5)])
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert len(next(shuffled_batches(3, 16, torch.Generator()))) == 3
