"""Padding may hold anything: it reaches neither outputs of valid tokens nor gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from by_hand import BACKENDS, by_hand, problem

from mingle.functional import LayerTensors, gated_experts, gated_experts_shared


def test_padding_may_hold_nan():
    p = problem(shape=(2, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    expected = gated_experts(**p, mask=mask)
    p["x"][0, 2:] = float("nan")
    got = gated_experts(**p, mask=mask)
    torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("gates", "shared"),
    [
        *product(("token", "sample", "batch"), (False, True)),
        *product(("given token", "given sample", "given batch"), (False,)),
    ],
)
def test_padding_that_is_not_finite_reaches_no_gradient(backend, gates, bad, shared):
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    results = []
    for padding in (0.0, 3.0, bad):
        p, reduce = problem(), gates
        p["x"][~mask] = padding
        if gates.startswith("given"):
            rows = {"token": (3, 5), "sample": (3,), "batch": ()}[gates.removeprefix("given ")]
            p |= dict(
                gate_weight=None,
                gate_bias=None,
                gates=torch.linspace(-1, 1, 4, dtype=torch.float64).expand(*rows, 4).clone(),
            )
            reduce = "sample"
        leaves = {name: tensor.requires_grad_() for name, tensor in p.items() if tensor is not None}
        if shared:
            x = p.pop("x")
            for name in ("weight", "bias", "A", "B"):
                leaves.pop(name).requires_grad_(False)
            layers = [LayerTensors(**p)] * 2
            y = sum(gated_experts_shared(x, layers, reduce=reduce, mask=mask, backend=backend))
        else:
            y = gated_experts(**p, reduce=reduce, mask=mask, backend=backend)
        results.append(
            dict(zip(leaves, torch.autograd.grad(y[mask].square().sum(), list(leaves.values())), strict=True))
        )
    for name, expected in results[0].items():
        for other in results[1:]:
            assert (
                torch.equal(other[name], expected)
                or (other[name] - expected).norm() <= 1e-14 * expected.norm()
            ), name


def test_only_padding_may_be_anything():
    p = problem(shape=(2, 4))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    p["x"][1, 2] = float("nan")
    p["gate_weight"].requires_grad_()
    y = gated_experts(**p, mask=mask)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_padding_that_is_finite_has_its_gradient():
    """Its outputs are computed all the same, and whoever reads them is told the truth."""
    p = {
        name: tensor.requires_grad_()
        for name, tensor in problem(shape=(2, 3), d_in=4, d_out=3, experts=2, rank=2).items()
    }
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    for backend in BACKENDS:
        torch.autograd.gradcheck(
            lambda *values, backend=backend: gated_experts(
                **dict(zip(p, values, strict=True)), mask=mask, backend=backend
            ),
            list(p.values()),
        )


def test_a_fully_padded_sample_sees_only_the_gate_bias():
    p = problem(shape=(1, 3))
    y = gated_experts(**p, mask=torch.zeros(1, 3, dtype=torch.bool))
    p["gate_weight"].zero_()
    torch.testing.assert_close(y, by_hand(p, "token"))
