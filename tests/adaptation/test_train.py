"""The adaptation loop: teachers, batches, losses, and steps that are skipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mingle import inject
from mingle.adaptation import train as adapt
from mingle.adaptation.optimizer import GateStep
from mingle.adaptation.train import (
    AdaptationDiverged,
    AdaptConfig,
    adapt_gates,
    entropy_loss,
    shuffled_batches,
)
from mingle.tasks.clip import ClipTask


def test_bf16_products_with_fp32_gates(base_model, tuned_states, samples):
    task, gates = ClipTask(), []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = copy.deepcopy(base_model).requires_grad_(False)
        layers = inject(model.vision_model, ("q_proj", "fc1"))
        for layer in layers.values():
            layer.add_expert(
                torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1
            )
        targets = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
        config = AdaptConfig(steps=10, lr=1e-2, precision=precision)
        trace = adapt_gates(
            task, model, layers, samples[0], targets, config, torch.Generator().manual_seed(0)
        )
        assert all(layer.gate_weight.dtype == torch.float32 for layer in layers.values())
        gates.append(trace.loss)
    assert gates[0] != gates[1]
    torch.testing.assert_close(torch.tensor(gates[0]), torch.tensor(gates[1]), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="precision='fp8': expected one of fp32, bf16"):
        AdaptConfig(precision="fp8")


@pytest.mark.parametrize("interval", [1, 4, 8])
def test_steps_that_are_skipped_between_two_looks_are_named(
    base_model, samples, monkeypatch, caplog, interval
):
    monkeypatch.setattr(adapt, "_INTERVALS", {"cpu": interval})
    model, layers = student(base_model)
    names, poisoned, steps = list(layers), {2: 0, 5: 1, 6: 0}, iter(range(1, 100))

    def poison(step, loss, real=GateStep.step):
        layer = poisoned.get(next(steps))
        if layer is not None:
            step.views[names[layer]][0, 0] = math.nan
        return real(step, loss)

    monkeypatch.setattr(GateStep, "step", poison)
    targets = torch.randn(24, 5)
    adapt_gates(
        ClipTask(), model, layers, samples[0], targets, AdaptConfig(steps=9), torch.Generator().manual_seed(0)
    )
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert told == [
        f"skipped step {i}: the gate gradient is not finite in {names[layer]}"
        for i, layer in poisoned.items()
    ]
    poisoned.update({11: 0, 12: 0, 13: 1, 14: 1})
    with pytest.raises(
        AdaptationDiverged, match="3 steps, last at step 4"
    ):  # the tenth call begins a new adaptation
        adapt_gates(
            ClipTask(),
            model,
            layers,
            samples[0],
            targets,
            AdaptConfig(steps=9),
            torch.Generator().manual_seed(0),
        )


def student(base_model, targets=("q_proj", "fc1")):
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, targets)
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1)
    return model, layers


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

    for targets in (logits, teacher):
        model, layers = student(base_model)
        config = AdaptConfig(steps=3, batch_size=5, lr=1e-2)
        adapt_gates(ClipTask(), model, layers, samples[0], targets, config, torch.Generator().manual_seed(0))
        gates.append(torch.cat([layer.gate_weight.flatten() for layer in layers.values()]))
    assert [len(seeds) for seeds in asked] == [15]
    assert torch.equal(*gates)
    trace = adapt_gates(
        ClipTask(), model, layers, samples[0], teacher, AdaptConfig(steps=0), torch.Generator()
    )
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
    adapt_gates(ClipTask(), model, layers, samples[0], None, config, torch.Generator().manual_seed(3))
    batches = shuffled_batches(24, 5, torch.Generator().manual_seed(3))
    for data, index in zip(seen[-3:], batches, strict=False):
        assert torch.equal(data.inputs["pixel_values"], samples[0].inputs["pixel_values"][index])


def test_entropy_of_the_rows_that_count():
    logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(logits, -1)
    rows = -(p * p.log()).sum(-1)
    torch.testing.assert_close(entropy_loss(logits), rows.mean())
    valid = torch.rand(4, 3) > 0.5
    loss = entropy_loss(logits, valid)
    torch.testing.assert_close(loss, rows[valid].mean())
    loss.backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].any(-1).all()
    assert entropy_loss(torch.tensor([[1e4, 0.0]])) == 0


def test_without_a_teacher_the_entropy_falls(base_model, samples):
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, ("q_proj", "fc1"))
    for layer in layers.values():
        for _ in range(2):
            layer.add_expert(
                torch.randn(4, layer.in_features) * 0.1,
                torch.randn(layer.out_features, 4) * 0.1,
                gate_bias=0.3,
            )
        layer.set_trainable_gates(2)
    before = entropy_loss(ClipTask().logits(model, samples[0])).item()
    config = AdaptConfig(steps=20, lr=1e-2, batch_size=24)
    trace = adapt_gates(ClipTask(), model, layers, samples[0], None, config, torch.Generator().manual_seed(0))
    assert trace.loss[0] == pytest.approx(before, rel=1e-5)
    assert entropy_loss(ClipTask().logits(model, samples[0])).item() < trace.loss[-1] < before - 1e-3
