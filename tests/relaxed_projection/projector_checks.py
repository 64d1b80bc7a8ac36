"""What the projector's Triton kernels must satisfy: for the kernels, and for mutants that must be caught."""

from __future__ import annotations

import torch

from mingle.adaptation.projector import RelaxedProjector
from mingle.kernels.relaxed_projection.reference import relaxed_projection


def projected_steps(shapes: list[tuple[int, int]], rows: int, gamma: float, steps: int = 12) -> None:
    """Steps of the relaxed projector's kernels against the formula in float64, layer by layer."""
    bases = [torch.linalg.qr(torch.randn(width, directions)).Q for width, directions in shapes]
    projector = RelaxedProjector(bases, gamma=gamma, beta=0.8, backend="triton")
    S = [torch.zeros(directions, dtype=torch.float64) for _, directions in shapes]
    for _ in range(steps):
        grads = [torch.randn(rows, width) for width, _ in shapes]
        expected = []
        for i, (grad, basis) in enumerate(zip(grads, bases, strict=True)):
            projected, S[i], _ = relaxed_projection(grad.double(), basis.double(), S[i], gamma, 0.8)
            expected.append(projected)
        assert projector.apply_(grads)
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)
    for got, want in zip(projector.interference().values(), S, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
