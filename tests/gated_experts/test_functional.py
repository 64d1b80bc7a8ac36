"""gated_experts against the formula, written out by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mingle.functional import LayerTensors, gated_experts, gated_experts_shared


def problem(shape=(3, 5), d_in=7, d_out=6, experts=4, rank=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    return dict(
        x=normal(*shape, d_in),
        weight=normal(d_out, d_in),
        bias=normal(d_out),
        A=normal(experts, rank, d_in),
        B=normal(experts, d_out, rank),
        gate_weight=normal(experts, d_in),
        gate_bias=normal(experts),
    )


def by_hand(p, reduce, mask=None):
    """Loops over samples, tokens and experts; nothing shared with the library."""
    x, y = p["x"], torch.empty(*p["x"].shape[:-1], len(p["weight"]), dtype=p["x"].dtype)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    for s in range(x.shape[0]):
        for n in range(x.shape[1]):
            if reduce == "token":
                seen = x[s, n]
            else:
                chosen = x[s][keep[s]] if reduce == "sample" else x[keep]
                seen = chosen.mean(0) if len(chosen) else torch.zeros_like(x[s, n])
            out = p["weight"] @ x[s, n] + p["bias"]
            for i in range(len(p["A"])):
                out = out + (p["gate_weight"][i] @ seen + p["gate_bias"][i]) * (
                    p["B"][i] @ (p["A"][i] @ x[s, n])
                )
            y[s, n] = out
    return y


BACKENDS = ("auto", "eager", "grouped")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 5, 8, dtype=torch.float64)), r"x has shape \[3, 5, 8\]"),
        (dict(B=torch.zeros(4, 6, 2, dtype=torch.float64)), r"B has shape \[4, 6, 2\], expected \[4, 6, 3\]"),
        (dict(gate_weight=torch.zeros(4, 6, dtype=torch.float64)), "gate_weight has shape"),
        (dict(gate_weight=None), "gate_weight and gate_bias are needed"),
        (dict(mask=torch.ones(3, 4, dtype=torch.bool)), "mask has shape"),
        (dict(reduce="mean"), "reduce='mean'"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_shapes_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        gated_experts(**(problem() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.zeros(4, 3, 7)), "A has dtype torch.float32, weight torch.float64"),
        (dict(mask=torch.ones(3, 5)), "mask has dtype"),
        (dict(A=torch.zeros(4, 3, 7, dtype=torch.float64, device="meta")), "A is on meta, x on cpu"),
    ],
)
def test_mixed_dtypes_and_devices_are_refused(change, message):
    with pytest.raises(TypeError, match=message):
        gated_experts(**(problem() | change))


GATES = dict(gates=torch.rand(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*problem(), "mask", "gates"])
def test_tensors_on_different_devices_are_both_named(name, backend):
    p = problem() | dict(mask=torch.ones(3, 5, dtype=torch.bool)) | (GATES if name == "gates" else {})
    p[name] = p[name].to("meta")
    with pytest.raises(
        TypeError, match="is on cpu, x on meta" if name == "x" else f"{name} is on meta, x on cpu"
    ):
        gated_experts(**p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(("x", "weight", "bias", "A", "B"), (torch.float32, torch.int64)),
        *product(("gate_weight", "gate_bias"), (torch.int64, torch.complex128)),
        *product(("mask",), (torch.uint8, torch.int64, torch.float32)),
        ("gates", torch.complex128),
    ],
)
def test_mixed_dtypes_are_refused_by_name(name, dtype, backend):
    p = problem() | dict(mask=torch.ones(3, 5, dtype=torch.bool)) | (GATES if name == "gates" else {})
    p[name] = p[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} has dtype|, {name} torch.float32:"):
        gated_experts(**p, backend=backend)


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
