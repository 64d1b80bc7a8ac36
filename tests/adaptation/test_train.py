"""The adaptation loop: it brings the student closer; steps that are not finite are skipped and named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import student

from mingle.adaptation import train as adapt
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.adaptation.losses import distillation
from mingle.adaptation.optimizer import GateStep
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.teacher import teacher_answers
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks.clip import ClipTask


def test_bf16_products_with_fp32_gates(base_model, tuned_states, samples):
    task, gates = ClipTask(), []
    for precision in ("fp32", "bf16"):
        model, layers = student(base_model)
        targets = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
        loss = distillation(lambda _, targets=targets: targets, 2.0)
        config = AdaptConfig(steps=10, lr=1e-2, precision=precision)
        trace = adapt_gates(task, model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
        assert all(layer.gate_weight.dtype == torch.float32 for layer in layers.values())
        gates.append(trace.loss)
    assert gates[0] != gates[1]
    torch.testing.assert_close(torch.tensor(gates[0]), torch.tensor(gates[1]), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="precision='fp8': expected one of fp32, bf16"):
        AdaptConfig(precision="fp8")


@pytest.mark.parametrize("interval", [1, 4, 8])
def test_skipped_steps_are_reported_with_their_number_and_layer(
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
    targets, config = torch.randn(24, 5), AdaptConfig(steps=9)
    loss = distillation(lambda _: targets, 2.0)
    adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert told == [
        f"skipped step {i}: the gate gradient is not finite in {names[layer]}"
        for i, layer in poisoned.items()
    ]
    poisoned.update({11: 0, 12: 0, 13: 1, 14: 1})
    # the tenth call begins a new adaptation
    with pytest.raises(AdaptationDiverged, match="3 steps, last at step 4"):
        adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))


def prepared(base_model, tuned):
    model, layers = student(base_model)
    teacher = copy.deepcopy(base_model)
    teacher.vision_model.load_state_dict(tuned)
    return model, layers, teacher


def test_adaptation_brings_the_student_closer_and_touches_only_gates(base_model, tuned_states, samples):
    task = ClipTask()
    model, layers, teacher = prepared(base_model, tuned_states[0])
    targets = teacher_answers(task, teacher, samples[0], 10)
    torch.testing.assert_close(targets, task.logits(teacher, samples[0]))
    frozen = {n: p.clone() for n, p in model.named_parameters() if "gate" not in n}
    projector = RelaxedProjector(
        {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
    )
    seen = []
    config = AdaptConfig(steps=30, lr=1e-2)
    trace = adapt_gates(
        task,
        model,
        layers,
        samples[0],
        distillation(lambda _: targets, 2.0),
        config,
        torch.Generator().manual_seed(0),
        projector,
        seen.append,
    )
    assert sum(trace.loss[-5:]) < sum(trace.loss[:5])
    assert [progress.step for progress in seen] == list(range(1, 31))
    assert seen[-1].loss == trace.loss[-1] and seen[-1].steps == 30
    assert seen[-1].strength == pytest.approx(
        sum(series[-1] for series in trace.strength.values()) / len(trace.strength)
    )
    assert set(trace.interference) == set(layers)
    assert all(len(series) == 30 for series in trace.strength.values())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_loss_that_is_nan_for_three_steps_stops_and_the_last_good_gates_stay(
    base_model, tuned_states, samples
):
    model, layers, _ = prepared(base_model, tuned_states[0])
    before = [layer.gate_weight.clone() for layer in layers.values()]
    loss = distillation(lambda _: torch.full((24, 5), float("nan")), 2.0)
    with pytest.raises(AdaptationDiverged, match="3 steps, last at step 3"):
        adapt_gates(ClipTask(), model, layers, samples[0], loss, AdaptConfig(), torch.Generator())
    assert all(torch.equal(a, layer.gate_weight) for a, layer in zip(before, layers.values(), strict=True))
