"""gated_experts against the formula, written out by hand."""

from __future__ import annotations

import pytest
import torch
from by_hand import BACKENDS, by_hand, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from mingle.functional import gated_experts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_formula(backend, reduce, masked):
    p = problem()
    mask = (
        torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
        if masked
        else None
    )
    torch.testing.assert_close(
        gated_experts(**p, reduce=reduce, mask=mask, backend=backend),
        by_hand(p, reduce, mask),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_gradients(backend, reduce):
    p = {
        name: tensor.requires_grad_()
        for name, tensor in problem(shape=(2, 3), d_in=4, d_out=3, experts=2, rank=2).items()
    }
    names = list(p)
    torch.autograd.gradcheck(
        lambda *values: gated_experts(
            **dict(zip(names, values, strict=True)), reduce=reduce, backend=backend
        ),
        list(p.values()),
    )


def test_gradient_reaches_x_through_every_gate():
    # Leaving out Σ dz_i w_i gives wrong gradients in the layers below; with zero experts' weight it would be
    # easy to miss.
    p = problem(experts=3)
    x = p["x"].requires_grad_()
    dy = torch.randn(3, 5, 6, dtype=torch.float64)
    (full,) = torch.autograd.grad(gated_experts(**p, reduce="token"), x, dy)
    frozen = (x @ p["gate_weight"].T + p["gate_bias"]).detach()
    (detached,) = torch.autograd.grad(gated_experts(**p, gates=frozen), x, dy)
    hidden = torch.einsum("snd,trd->sntr", x.detach(), p["A"])
    dz = torch.einsum("sno,tor,sntr->snt", dy, p["B"], hidden)
    torch.testing.assert_close(full - detached, dz @ p["gate_weight"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_experts_is_bitwise_the_base(backend):
    p = problem(experts=0, dtype=torch.float32)
    y = gated_experts(**p, backend=backend)
    assert torch.equal(y, torch.nn.functional.linear(p["x"], p["weight"], p["bias"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [1, 64])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_one_expert_and_sixty_four_are_the_formulas(backend, experts, reduce):
    p = problem(experts=experts)
    torch.testing.assert_close(gated_experts(**p, reduce=reduce, backend=backend), by_hand(p, reduce))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1, 3, 17])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_ranks_of_1_3_and_17_are_the_formulas(backend, rank, reduce):
    p = problem(rank=rank)
    torch.testing.assert_close(gated_experts(**p, reduce=reduce, backend=backend), by_hand(p, reduce))


@pytest.mark.parametrize("backend", ["eager", "grouped"])
@pytest.mark.parametrize("reduce", ["token", "batch"])  # low-rank, and folded
def test_fp16_sums_accumulate_in_fp32(backend, reduce):
    """Adding ones one by one, fp16 would stay at 2048."""
    p = {name: torch.zeros_like(tensor) for name, tensor in problem((4, 8), 4096, 8, 1, 1).items()}
    p |= dict(x=torch.ones(4, 8, 4096), A=torch.ones(1, 1, 4096), B=torch.ones(1, 8, 1))
    p |= dict(weight=torch.ones(8, 4096), gate_bias=torch.ones(1))
    y = gated_experts(**{name: tensor.half() for name, tensor in p.items()}, reduce=reduce, backend=backend)
    assert torch.equal(y, torch.full((4, 8, 8), 8192, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_zero_tokens_give_an_empty_output_and_zero_gradients(shape, reduce):
    p = {name: tensor.requires_grad_() for name, tensor in problem(shape=shape).items()}
    y = gated_experts(**p, reduce=reduce)
    assert y.shape == (*shape, 6)
    y.sum().backward()
    assert all((p[name].grad == 0).all() for name in ("gate_weight", "A", "B", "weight"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 6),
    rank=st.integers(1, 5),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    layout=st.sampled_from(["plain", "transposed", "expanded", "sliced"]),
    reduce=st.sampled_from(["token", "sample", "batch"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_grouped_agrees_with_eager(experts, rank, d_in, d_out, layout, reduce, dtype):
    p = problem((2, 3), d_in, d_out, experts, rank, dtype, seed=experts * 100 + rank)
    x = p["x"]
    p["x"] = {
        "plain": x,
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": x[:1].expand(2, 3, d_in),
        "sliced": torch.cat([x, x], -1)[..., ::2][..., :d_in] if d_in > 1 else x,
    }[layout]
    exact = gated_experts(**{k: v.double() for k, v in p.items()}, reduce=reduce, backend="eager")
    error = (
        gated_experts(**p, reduce=reduce, backend="grouped").double() - exact
    ).norm() / exact.norm().clamp_min(1e-30)
    assert error < (2e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_gates_of_other_dtypes_are_promoted_as_documented(backend, dtype, reduce):
    p = problem()
    exact = p | dict(
        gate_weight=p["gate_weight"].to(dtype).double(), gate_bias=p["gate_bias"].float().double()
    )
    mixed = p | dict(gate_weight=p["gate_weight"].to(dtype), gate_bias=p["gate_bias"].float())
    y = gated_experts(**mixed, reduce=reduce, backend=backend)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, by_hand(exact, reduce), rtol=1e-5, atol=1e-4)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3, 0, 2]), 4)
    for gates in (one_hot, one_hot.bool(), one_hot.to(dtype)):
        y, expected = (
            gated_experts(**p, gates=given, backend=backend) for given in (gates, one_hot.double())
        )
        assert torch.equal(y, expected)


def test_autocast():
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_experts(**p)
    assert y.dtype == torch.bfloat16
    exact = by_hand({k: v.double() for k, v in p.items()}, "sample")
    assert (y.double() - exact).norm() / exact.norm() < 1e-2
