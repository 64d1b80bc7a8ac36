"""What the projector's Triton kernels must satisfy: for the kernels, and for mutants that must be caught."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from layouts import dense, layouts
from torch import Tensor

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


SHAPES = [(9, 3), (6, 1), (9, 3), (6, 0), (5, 5)]
#: of gradients, which are written to: expanded ones are refused
writable = layouts.map(lambda layout: layout._replace(expanded=frozenset()))


@st.composite
def laid_out_steps(draw: st.DrawFn, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Bases of five layers, and gradients of two steps, which lie in memory in any way."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bases = [torch.linalg.qr(torch.randn(*shape, generator=generator)).Q.to(dtype) for shape in SHAPES]
    rows = draw(st.lists(st.integers(0, 3), min_size=len(SHAPES), max_size=len(SHAPES)))
    steps = [
        [
            draw(writable).of(torch.randn(n, width, generator=generator, dtype=dtype))
            for n, (width, _) in zip(rows, SHAPES, strict=True)
        ]
        for _ in range(2)
    ]
    return [draw(layouts).of(basis) for basis in bases], steps


def strides_do_not_matter(bases: list[Tensor], steps: list[list[Tensor]], backend: str) -> None:
    """Gradients and S are those for the same values without gaps."""
    strided = RelaxedProjector(bases, gamma=1.3, beta=0.6, backend=backend)
    plain = RelaxedProjector([dense(basis) for basis in bases], gamma=1.3, beta=0.6, backend=backend)
    for grads in steps:
        copies = [dense(grad) for grad in grads]
        assert strided.apply_(grads) and plain.apply_(copies)
        assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))
    assert torch.equal(strided.interferences, plain.interferences)
    assert strided.interferences.isfinite().all()
