"""The losses by hand: distillation, and entropy where there is no teacher."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mingle import inject
from mingle.adaptation.losses import distillation_loss, entropy, entropy_loss
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks.clip import ClipTask

D64 = dict(dtype=torch.float64)


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
    trace = adapt_gates(
        ClipTask(), model, layers, samples[0], entropy, config, torch.Generator().manual_seed(0)
    )
    assert trace.loss[0] == pytest.approx(before, rel=1e-5)
    assert entropy_loss(ClipTask().logits(model, samples[0])).item() < trace.loss[-1] < before - 1e-3


def test_distillation_loss_by_hand():
    student, teacher = torch.randn(3, 4, **D64), torch.randn(3, 4, **D64)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        zs, zt = (sum(math.exp(v / 2) for v in row) for row in (s, t))
        expected -= sum(math.exp(b / 2) / zt * (a / 2 - math.log(zs)) for a, b in zip(s, t, strict=True))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected / 3)
