"""The gate step and whole adaptations on a GPU, against the same on the CPU."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import student

from mingle import inject
from mingle.adaptation import optimizer as gate_step
from mingle.adaptation import train as adapt
from mingle.adaptation.losses import distillation
from mingle.adaptation.optimizer import Advance, GateStep
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.trace import AdaptTrace
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

pytestmark = pytest.mark.gpu


def adapted(
    base_model: torch.nn.Module, seeds: TaskData, device: str, **config: object
) -> tuple[AdaptTrace, torch.Tensor]:
    """Ten steps on a tiny model: what was recorded, and all gates."""
    model, layers = student(base_model)
    projector = RelaxedProjector(
        {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
    )
    model.to(device)
    projector.to(device)
    targets = torch.randn(len(seeds), 5, generator=torch.Generator().manual_seed(1))
    settings = AdaptConfig(steps=10, lr=1e-2, **config)  # type: ignore[arg-type]
    loss, generator = distillation(lambda _: targets, 2.0), torch.Generator().manual_seed(0)
    trace = adapt_gates(ClipTask(), model, layers, seeds, loss, settings, generator, projector)
    return trace, torch.cat([layer.gate_weight.detach().flatten().cpu() for layer in layers.values()])


def test_an_adaptation_equals_that_on_the_cpu_and_is_captured(base_model, samples) -> None:  # type: ignore[no-untyped-def]
    replayed = []

    def spy(advance: Advance, *rest: Any) -> Advance:
        result = gate_step.captured(advance, *rest)
        replayed.append(result is not advance)
        return result

    with mock.patch.object(adapt, "captured", spy):
        trace, gates = adapted(base_model, samples[0], "cuda")
    assert replayed == [True]
    expected_trace, expected = adapted(base_model, samples[0], "cpu")
    torch.testing.assert_close(
        torch.tensor(trace.loss), torch.tensor(expected_trace.loss), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(gates, expected, rtol=1e-3, atol=1e-5)


def test_captured_and_single_steps_give_the_same_gates(base_model, samples) -> None:  # type: ignore[no-untyped-def]
    trace, gates = adapted(base_model, samples[0], "cuda")
    with mock.patch.object(adapt, "captured", lambda advance, *_: advance):
        single_trace, single = adapted(base_model, samples[0], "cuda")
    torch.testing.assert_close(gates, single, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        torch.tensor(trace.loss), torch.tensor(single_trace.loss), rtol=1e-5, atol=1e-7
    )
    again = adapted(base_model, samples[0], "cuda")
    assert torch.equal(again[1], gates) and again[0].loss == trace.loss


def test_bf16_products(base_model, samples) -> None:  # type: ignore[no-untyped-def]
    trace, gates = adapted(base_model, samples[0], "cuda", precision="bf16")
    expected, _ = adapted(base_model, samples[0], "cuda")
    assert gates.dtype == torch.float32
    torch.testing.assert_close(torch.tensor(trace.loss), torch.tensor(expected.loss), rtol=3e-2, atol=3e-2)


def test_a_step_that_is_not_finite_is_skipped_on_the_device(base_model, samples) -> None:  # type: ignore[no-untyped-def]
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, ("q_proj",))
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4))
    model.cuda()
    step = GateStep(layers, 0.1)
    before = [gate.clone() for gate in step.gates]
    step.gradients.fill_(1.0)
    step.gradients[3] = math.inf
    torch.cuda.set_sync_debug_mode("error")
    try:
        skipped = step.step(torch.ones((), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, step.gates, strict=True))
