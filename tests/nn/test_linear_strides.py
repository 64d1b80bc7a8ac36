"""A layer does not mind how what it is given lies in memory: base, experts, gates, input, mask, gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import dense, layouts_of
from torch import Tensor, nn

from mingle.kernels import gemm, prepack
from mingle.nn.linear import MingleLinear

LEADING = [(1, 6), (2, 3), (4,), (2, 2, 3)]


def tensors(leading: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return dict(
        weight=normal(6, 8), bias=normal(6), x=normal(*leading, 8), upstream=normal(*leading, 6),
        A0=normal(2, 8), B0=normal(6, 2), w0=normal(8), b0=normal(1),
        A1=normal(3, 8), B1=normal(6, 3), w1=normal(8), b1=normal(1),
        mask=torch.rand(leading, generator=generator) < 0.6, gates=normal(*leading[:-1], 2),
    )  # fmt: skip


def results(t: dict[str, Tensor], reduce: str, how: str, packed: bool) -> list[Tensor]:
    """The output without and with a tape, and the gradients of x and of the trainable gate."""
    base = nn.Linear(8, 6, dtype=t["x"].dtype)
    base.weight, base.bias = nn.Parameter(t["weight"]), nn.Parameter(t["bias"])
    layer = MingleLinear.from_linear(base, reduce, prepack=packed)
    for i in "01":
        layer.add_expert(t["A" + i], t["B" + i], gate_weight=t["w" + i], gate_bias=t["b" + i])
    if how == "given gates":
        layer.given_gates = t["gates"]
    if how == "token mask":
        layer.token_mask = t["mask"]
    x = t["x"].detach().requires_grad_()
    mask = t["mask"] if how == "mask" else None
    with torch.no_grad():
        untaped = layer(x, mask)
    y = layer(x, mask)
    needed = [x] if how == "given gates" else [x, layer.gate_weight, layer.gate_bias]
    return [untaped, y.detach(), *torch.autograd.grad(y, needed, t["upstream"])]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(LEADING).flatmap(
        lambda leading: st.tuples(st.just(leading), layouts_of(*tensors(leading, torch.float32)))
    ),
    st.sampled_from(["token", "sample", "batch"]),
    st.sampled_from(["no mask", "mask", "token mask", "given gates"]),
    st.sampled_from([torch.float64, torch.float32]),
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_strides_of_everything_a_layer_is_given_do_not_matter(packed, problem, reduce, how, dtype):
    if packed:  # in single precision only
        dtype = torch.float32
    leading, lies = problem
    strided = {name: lies[name].of(tensor) for name, tensor in tensors(leading, dtype).items()}
    plain = {name: dense(tensor) for name, tensor in strided.items()}
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for got, expected in zip(
        results(strided, reduce, how, packed), results(plain, reduce, how, packed), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _packing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Small products go to the library that packs, where there is one; copies in memory of their own."""
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    if gemm._packed_agrees(torch.float32):
        monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(prepack, "_copies", {})
