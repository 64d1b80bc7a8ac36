"""The adaptation loop around the projector: the loss, the batches, and what changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mingle import inject
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.train import (
    AdaptationDiverged,
    AdaptConfig,
    adapt_gates,
    distillation_loss,
    shuffled_batches,
    teacher_logits,
)
from mingle.tasks.clip import ClipTask

D64 = dict(dtype=torch.float64)


def test_distillation_loss_by_hand():
    student, teacher = torch.randn(3, 4, **D64), torch.randn(3, 4, **D64)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        zs, zt = (sum(math.exp(v / 2) for v in row) for row in (s, t))
        expected -= sum(math.exp(b / 2) / zt * (a / 2 - math.log(zs)) for a, b in zip(s, t, strict=True))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected / 3)


def test_batches_pass_through_all_samples_in_a_new_order():
    batches = shuffled_batches(10, 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert len(next(shuffled_batches(3, 16, torch.Generator()))) == 3


def prepared(base_model, tuned):
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, ("q_proj", "fc1"))
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1)
    teacher = copy.deepcopy(base_model)
    teacher.vision_model.load_state_dict(tuned)
    return model, layers, teacher


def test_adaptation_brings_the_student_closer_and_touches_only_gates(base_model, tuned_states, samples):
    task = ClipTask()
    model, layers, teacher = prepared(base_model, tuned_states[0])
    targets = teacher_logits(task, teacher, samples[0], 10)
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
        targets,
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


def test_adaptation_gives_up_on_a_loss_that_stays_nan(base_model, tuned_states, samples):
    model, layers, _ = prepared(base_model, tuned_states[0])
    before = [layer.gate_weight.clone() for layer in layers.values()]
    targets = torch.full((24, 5), float("nan"))
    with pytest.raises(AdaptationDiverged, match="3 steps, last at step 3"):
        adapt_gates(ClipTask(), model, layers, samples[0], targets, AdaptConfig(), torch.Generator())
    assert all(torch.equal(a, layer.gate_weight) for a, layer in zip(before, layers.values(), strict=True))
