"""relaxed_projection: the identity forward, a projected gradient backward."""

from __future__ import annotations

import pytest
import torch

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
