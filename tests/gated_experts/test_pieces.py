"""Sums over many rows, which the CPU makes of a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from mingle.kernels.gated_experts import grouped

ROWS, WIDTH, GROUP, EXPERTS, RANK = 60, 24, 5, 3, 4


@pytest.fixture(params=[1, 7 * WIDTH, 1 << 20])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [True, False])
def test_means_of_groups(dtype, masked):
    x = torch.randn(ROWS, WIDTH).to(dtype)
    mask = torch.rand(ROWS) < 0.5 if masked else None
    valid = torch.ones(ROWS) if mask is None else mask.float()
    sums = (x.float() * valid[:, None]).view(-1, GROUP, WIDTH).sum(1)
    expected = sums / valid.view(-1, GROUP).sum(1).clamp_min(1)[:, None]
    found = grouped.group_mean(x, mask, GROUP)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("pieces")
def test_gates_of_single_tokens():
    x, weight, bias = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(EXPERTS, WIDTH), torch.randn(EXPERTS)
    z, _ = grouped.gates(x, weight, bias, None, 1)
    torch.testing.assert_close(z, x.float() @ weight.mT + bias)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_for_the_gates_gradients(dtype):
    dy, B = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(EXPERTS, WIDTH, RANK).to(dtype)
    hidden = torch.randn(ROWS, EXPERTS * RANK).to(dtype)
    z = torch.randn(ROWS // GROUP, EXPERTS)
    u = dy @ B.mT.flatten(0, 1).mT
    expected = (u.float() * hidden.float()).view(ROWS, EXPERTS, RANK).sum(-1)
    _, sums = grouped.upstream(dy, B, hidden, z, GROUP, None)
    torch.testing.assert_close(sums, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
