"""relaxed_projection: the identity forward, a projected gradient backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import dense, layouts_of

from mingle.functional import relaxed_projection


def test_relaxed_projection_is_the_identity_forward_and_projects_backward():
    weight = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    basis = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    upstream = torch.randn(2, 6, dtype=torch.float64)

    def gradient(lam):
        out = relaxed_projection(weight, basis, lam)
        assert torch.equal(out, weight)
        return torch.autograd.grad(out, weight, upstream)[0]

    torch.testing.assert_close(gradient(torch.zeros(3, dtype=torch.float64)), upstream, rtol=0, atol=0)
    assert (gradient(torch.ones(3, dtype=torch.float64)) @ basis).abs().max() < 1e-14
    lam = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(gradient(lam) @ basis, (upstream @ basis) * (1 - lam))
    with pytest.raises(ValueError, match="expected"):
        relaxed_projection(weight, basis, lam[:2])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(layouts_of("weight", "basis", "lam", "upstream"), st.integers(0, 3), st.sampled_from([(), (2,)]))
def test_strides_of_every_argument_do_not_matter(lies, directions, leading):
    generator = torch.Generator().manual_seed(directions)
    shapes = dict(
        weight=(*leading, 3, 6), basis=(6, directions), lam=(directions,), upstream=(*leading, 3, 6)
    )
    strided = {
        name: lies[name].of(torch.rand(shape, generator=generator, dtype=torch.float64))
        for name, shape in shapes.items()
    }
    results = []
    for tensors in (strided, {name: dense(tensor) for name, tensor in strided.items()}):
        weight = tensors["weight"].detach().requires_grad_()
        out = relaxed_projection(weight, tensors["basis"], tensors["lam"])
        assert torch.equal(out, weight)
        results.append(torch.autograd.grad(out, weight, tensors["upstream"])[0])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_other_dtypes_and_devices_are_named():
    weight, basis, lam = torch.randn(2, 6), torch.randn(6, 3), torch.ones(3)
    with pytest.raises(TypeError, match="basis has dtype torch.float64, weight torch.float32"):
        relaxed_projection(weight, basis.double(), lam)
    with pytest.raises(TypeError, match="lam has dtype torch.int64"):
        relaxed_projection(weight, basis, lam.long())
    with pytest.raises(TypeError, match="lam is on meta, weight on cpu"):
        relaxed_projection(weight, basis, lam.to("meta"))
    half = weight.half().requires_grad_()
    relaxed_projection(half, basis.half(), lam.double()).sum().backward()
    assert half.grad.dtype == torch.float16
