"""The registered operators: what tracers may rely on, and that tracing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mingle
from mingle import ops
from mingle.functional import gated_experts


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


def arguments(
    tokens=6,
    group=3,
    d_in=5,
    d_out=4,
    experts=3,
    rank=2,
    dtype=torch.float32,
    grad=True,
    given=False,
    masked=False,
    strided=False,
):
    g = torch.Generator().manual_seed(0)

    def normal(*size, needs=False):
        tensor = torch.randn(*size, generator=g).to(dtype)
        if strided:
            tensor = tensor.repeat_interleave(2, -1)[..., ::2]
        return tensor.requires_grad_(needs and grad)

    gates = normal(tokens // group, experts, needs=True) if given else None
    mask = (torch.arange(2 * tokens) % 3 != 1)[::2] if strided else torch.arange(tokens) % 3 != 1
    return (
        normal(tokens, d_in, needs=True),
        normal(d_out, d_in),
        normal(d_out),
        normal(experts, rank, d_in),
        normal(experts, d_out, rank),
        None if given else normal(experts, d_in, needs=True),
        None if given else normal(experts, needs=True),
        gates,
        mask if masked else None,
    )


CASES = {
    "gradients": dict(),
    "no gradients": dict(grad=False),
    "no tokens": dict(tokens=0),
    "strided": dict(strided=True),
    "token gates": dict(group=1),
    "masked": dict(masked=True),
    "strided and masked": dict(strided=True, masked=True),
    "given gates": dict(given=True),
    "half precision": dict(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck_gated_experts(case):
    options = CASES[case]
    grad = options.get("grad", True)
    torch.library.opcheck(
        ops.gated_experts, (*arguments(**options), options.get("group", 3), 1, False, grad, "grouped")
    )


def test_opcheck_gated_experts_with_sparse_gates():
    args = list(arguments(grad=False, given=True))
    args[7][0, 1:] = 0
    torch.library.opcheck(ops.gated_experts, (*args, 3, 0, True, False, "grouped"))


@pytest.mark.parametrize("case", [case for case in CASES if case != "no tokens"])
def test_opcheck_gated_experts_folded(case):
    options = {**CASES[case], "group": 6}
    torch.library.opcheck(ops.gated_experts_folded, (*arguments(**options), 1, "grouped"))


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("tokens", [6, 0])
def test_opcheck_the_backwards(need_x, tokens):
    x, weight, _, A, B, gate_weight, _, _, _ = arguments(tokens=tokens, grad=False)
    first = 0 if need_x else 2
    dy, hidden, z = torch.randn(tokens, 4), torch.randn(tokens, 6), torch.randn(tokens // 3, 3)
    torch.library.opcheck(
        ops.gated_experts_backward,
        (dy, weight, A, B, gate_weight, None, hidden, z, 3, first, need_x, need_x, False, "grouped"),
    )
    if tokens:
        torch.library.opcheck(
            ops.gated_experts_folded_backward, (dy, x, weight, A, B, gate_weight, None, first, need_x)
        )


@pytest.mark.parametrize("folded", [False, True])
def test_eager_calls_and_the_dispatcher_agree_bitwise(folded):
    """Eager calls go past the dispatcher; both ways run the same code."""
    args = arguments()
    operator = ops.FOLDED if folded else ops.LOW_RANK
    options = (0, "grouped") if folded else (3, 0, False, True, "grouped")
    direct, registered = operator(True, *args, *options)[0], operator.registered(*args, *options)[0]
    assert torch.equal(direct, registered)
    upstream = torch.randn(direct.shape, generator=torch.Generator().manual_seed(1))
    needed = [tensor for tensor in args if tensor is not None and tensor.requires_grad]
    for a, b in zip(
        torch.autograd.grad(direct, needed, upstream),
        torch.autograd.grad(registered, needed, upstream),
        strict=True,
    ):
        assert torch.equal(a, b)


def model(reduce: str) -> nn.Sequential:
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    for layer in mingle.inject(stack, ("0", "2"), reduce).values():
        for _ in range(2):
            layer.add_expert(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    return stack


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_compiles_without_a_graph_break(reduce):
    plain, x = model(reduce), torch.randn(4, 5, 8)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for module in (plain, compiled):
        module(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), plain(x))
    for (name, expected), got in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (expected.grad is None) == (got.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_one_graph_serves_any_number_of_tokens():
    compiled = torch.compile(model("sample"), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for samples, tokens in ((4, 5), (3, 7), (2, 11)):
            assert compiled(torch.randn(samples, tokens, 8)).shape == (samples, tokens, 8)


def test_the_default_compiler_agrees():
    plain, x = model("sample"), torch.randn(4, 5, 8)
    compiled = torch.compile(plain, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_autocast_computes_in_its_dtype_and_keeps_the_gates_exact(backend):
    torch.manual_seed(0)
    layer = mingle.MingleLinear.from_linear(nn.Linear(32, 24), backend=backend)
    for _ in range(3):
        layer.add_expert(torch.randn(4, 32) / 6, torch.randn(24, 4) / 2, gate_bias=0.5)
    x = torch.randn(4, 5, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = layer(x)
    assert (y - expected).norm() < 1e-2 * expected.norm()
    y.float().sum().backward()
    assert x.grad.dtype == layer.gate_weight.grad.dtype == torch.float32


def test_gate_weights_may_be_wider_than_the_layer():
    """Small optimizer steps vanish in bfloat16; mixed precision keeps fp32 gates."""
    p = [torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6), torch.randn(2, 4, 8), torch.randn(2, 6, 4)]
    half = [tensor.bfloat16() for tensor in p]
    gate_weight, gate_bias = torch.randn(2, 8, requires_grad=True), torch.randn(2, requires_grad=True)
    for reduce in ("token", "sample", "batch"):
        y = gated_experts(*half, gate_weight, gate_bias, reduce=reduce)
        exact = gated_experts(
            *(tensor.double() for tensor in half), gate_weight.double(), gate_bias.double(), reduce=reduce
        )
        assert y.dtype == torch.bfloat16
        assert (y - exact).norm() < 1e-2 * exact.norm()
        y.float().sum().backward()
        assert gate_weight.grad.dtype == torch.float32


def test_backward_through_the_backward_says_that_it_cannot():
    args = arguments()
    y = ops.LOW_RANK(True, *args, 3, 0, False, True, "grouped")[0]
    (grad,) = torch.autograd.grad(y.square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize("reason", ["float64", "cpu"])
def test_an_explicit_backend_that_cannot_run_says_why(reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dtype = torch.float64 if reason == "float64" else torch.float32
    layer = mingle.MingleLinear.from_linear(nn.Linear(4, 4, dtype=dtype), backend="triton")
    layer.add_expert(torch.randn(1, 4), torch.randn(4, 1))
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run.*{reason}"):
        layer(torch.randn(1, 1, 4, dtype=dtype))
