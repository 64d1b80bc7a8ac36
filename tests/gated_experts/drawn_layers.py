"""Random calls of `gated_experts_shared` for hypothesis: layers of one input, laid out anyhow."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from drawn_problems import make
from hypothesis import strategies as st
from layouts import dense, layouts_of
from torch import Tensor

from mingle.functional import LayerTensors, gated_experts_shared
from mingle.kernels.gated_experts.reference import REDUCTIONS


class SharedProblem(NamedTuple):
    """The arguments of one call: one list entry per layer, `upstream` being the gradient of its output."""

    x: Tensor
    layers: list[LayerTensors]
    mask: Tensor | None
    reduce: str
    frozen_gates: list[int]
    upstream: list[Tensor]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> SharedProblem:
        return self._replace(
            x=change(self.x),
            layers=[LayerTensors(*(change(t) for t in layer if t is not None)) for layer in self.layers],
            mask=None if self.mask is None else change(self.mask),
            upstream=[change(dy) for dy in self.upstream],
        )

    def solve(self, backend: str) -> list[Tensor]:
        """The outputs and the gradients of x and of all gates."""
        x = self.x.detach().requires_grad_()
        layers = [
            layer._replace(
                gate_weight=layer.gate_weight.detach().requires_grad_(),
                gate_bias=layer.gate_bias.detach().requires_grad_(),
            )
            for layer in self.layers
        ]
        options = {name: getattr(self, name) for name in ("mask", "reduce", "frozen_gates")}
        ys = gated_experts_shared(x, layers, **options, backend=backend)
        gates = [gate for layer in layers for gate in (layer.gate_weight, layer.gate_bias)]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *gates], self.upstream)]


@st.composite
def shared_problems(draw: st.DrawFn, dtype: torch.dtype) -> SharedProblem:
    leading = draw(st.sampled_from([(1, 6), (2, 3), (3, 5), (2, 2, 3)]))
    d_in, rank, reduce = draw(st.integers(2, 20)), draw(st.integers(1, 5)), draw(st.sampled_from(REDUCTIONS))
    masked = draw(st.booleans())
    parts = [
        make(leading, d_in, draw(st.integers(2, 20)), draw(st.integers(1, 4)), rank, dtype, reduce, seed=seed)
        for seed in range(draw(st.integers(2, 3)))
    ]
    layers, upstream = [], []
    for part in parts:
        lies = draw(layouts_of(*LayerTensors._fields, "upstream"))
        layers.append(LayerTensors(*(lies[name].of(part.tensors[name]) for name in LayerTensors._fields)))
        upstream.append(lies["upstream"].of(part.upstream))
    lies = draw(layouts_of("x", "mask"))
    mask = torch.rand(leading, generator=torch.Generator().manual_seed(9)) < 0.6
    return SharedProblem(
        lies["x"].of(parts[0].tensors["x"]),
        layers,
        lies["mask"].of(mask) if masked else None,
        reduce,
        [draw(st.integers(0, len(layer.A))) for layer in layers],
        upstream,
    )


def strides_do_not_matter(problem: SharedProblem, backend: str) -> None:
    """The results are those for the same values without gaps, up to the order of a few sums."""
    tolerance = 1e-12 if problem.x.dtype == torch.float64 else 1e-5
    for got, expected in zip(problem.solve(backend), problem.mapped(dense).solve(backend), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 10)
