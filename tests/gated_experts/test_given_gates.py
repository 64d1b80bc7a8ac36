"""Gates that are given in place of the linear ones."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from by_hand import BACKENDS, problem

from mingle.functional import gated_experts


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_gates_replace_the_linear_ones(backend):
    p = problem()
    linear = p.pop("gate_weight"), p.pop("gate_bias")
    p |= {"gate_weight": None, "gate_bias": None, "backend": backend}
    token = torch.randn(3, 5, 4, dtype=torch.float64)
    sample, batch = token[:, 0], token[0, 0]
    y = gated_experts(**p, gates=sample)
    torch.testing.assert_close(y, gated_experts(**p, gates=sample[:, None].expand(3, 5, 4)))
    torch.testing.assert_close(
        gated_experts(**p, gates=batch), gated_experts(**p, gates=batch.expand(3, 5, 4))
    )
    assert not torch.allclose(y, gated_experts(**(p | {"gate_weight": linear[0], "gate_bias": linear[1]})))
    with pytest.raises(ValueError, match="gates has shape"):
        gated_experts(**p, gates=token[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", list(product((1, 2), (1, 3), (1, 5))))
def test_given_gates_may_be_shared_along_any_dimension(backend, shape):
    p = problem(shape=(2, 3, 5)) | {"gate_weight": None, "gate_bias": None, "backend": backend}
    gates = torch.randn(
        *shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    y, expected = gated_experts(**p, gates=gates), gated_experts(**p, gates=gates.expand(2, 3, 5, 4))
    torch.testing.assert_close(y, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(value.square().sum(), gates) for value in (y, expected))
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    "chosen", [[3, 0, 2, 4], [1, 1, 4, 4], [2, 2, 2, 2]], ids=["one expert each", "pairs", "one for all"]
)
@pytest.mark.parametrize("tokens", [3, 20])
def test_one_hot_gates_take_the_chosen_expert(chosen, tokens):
    """Sparse gates are computed differently for many and few tokens, for experts of one sample and of
    several.
    """
    p = problem(shape=(4, tokens), experts=5)
    gates = torch.nn.functional.one_hot(torch.tensor(chosen), 5).double() * 0.7
    given = p | dict(gate_weight=None, gate_bias=None, gates=gates)
    x = p["x"].requires_grad_()
    results = [gated_experts(**given, backend=backend) for backend in ("eager", "auto")]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
    for expected, got in (results, gradients):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(gated_experts(**given), results[0], rtol=1e-12, atol=1e-12)
