"""The relaxed projector, the gate step and whole adaptations on a GPU, against the same on the CPU and in
float64.
"""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import pytest
import torch

from mingle import inject
from mingle.adaptation import optimizer as gate_step
from mingle.adaptation import train as adapt
from mingle.adaptation.losses import distillation
from mingle.adaptation.optimizer import Advance, GateStep
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.trace import AdaptTrace
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.kernels.relaxed_projection import reference
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

pytestmark = pytest.mark.gpu

# widths and directions of layers as in ViT-L after 20 tasks, in MINGLE after a few, and odd ones
SHAPES = [(1024, 57), (4096, 57), (768, 21), (3072, 21), (768, 21), (769, 3), (17, 17), (64, 0), (1, 1)]


def bases() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.linalg.qr(torch.randn(d, max(k, 1), generator=generator)).Q[:, :k] for d, k in SHAPES]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("backend", ["triton", "grouped"])
def test_hundreds_of_projected_steps_follow_the_formula(backend: str, rows: int) -> None:
    U = bases()
    projector = RelaxedProjector(U, beta=0.9, backend=backend).cuda()
    S = [torch.zeros(k, dtype=torch.float64) for _, k in SHAPES]
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        grads = [torch.randn(rows, d, generator=generator) for d, _ in SHAPES]
        if step % 20 == 7:
            grads[step % 9][0, -1] = math.nan
        uploaded = [grad.cuda() for grad in grads]
        assert projector.apply_(uploaded) == (step % 20 != 7)
        if step % 20 == 7:
            continue
        for i, (grad, basis) in enumerate(zip(grads, U, strict=True)):
            expected, S[i], _ = reference.relaxed_projection(grad.double(), basis.double(), S[i], 1.0, 0.9)
            torch.testing.assert_close(uploaded[i].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(projector.interference().values(), S, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-6)


def test_equal_bits_fifty_times_and_no_waiting() -> None:
    projector = RelaxedProjector(bases()).cuda()
    layout = projector.layout(dict.fromkeys(projector.names, 1))
    gradients = torch.randn(layout.size, device="cuda")
    results = set()
    for _ in range(50):
        projector.interferences.zero_()
        flat = gradients.clone()
        projector.project_(flat, layout)
        results.add((flat.cpu().numpy().tobytes(), projector.interferences.cpu().numpy().tobytes()))
    assert len(results) == 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        projector.project_(gradients, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def adapted(
    base_model: torch.nn.Module, seeds: TaskData, device: str, **config: object
) -> tuple[AdaptTrace, torch.Tensor]:
    """Ten steps on a tiny model: what was recorded, and all gates."""
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, ("q_proj", "fc1"))
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1)
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
