"""The relaxed projector on a GPU, against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mingle.adaptation.projector import RelaxedProjector
from mingle.kernels.relaxed_projection import reference

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
