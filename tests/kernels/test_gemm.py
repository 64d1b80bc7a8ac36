"""Dense CPU products: either library gives the product for any strides."""

from __future__ import annotations

import logging
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mingle.kernels import gemm

pytestmark = pytest.mark.usefixtures("own_choice")

# rows, width, outputs
SHAPES = ((5, 7, 9), (1, 7, 9), (5, 7, 1), (5, 1, 9), (1, 1, 1), (33, 65, 31), (64, 100, 48))


LAYOUTS = ("contiguous", "transposed", "sliced", "every other", "expanded rows", "expanded columns")


UNIT = 2.0**-23


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """`matrix` with other strides; whatever lies between its elements is NaN.  Expanded ones repeat the first
    row or column.
    """
    rows, columns = matrix.shape
    if layout == "transposed":
        return matrix.T.contiguous().T
    if layout == "sliced":
        wide = matrix.new_full((rows + 2, columns + 3), math.nan)
        wide[1:-1, 1:-2] = matrix
        return wide[1:-1, 1:-2]
    if layout == "every other":
        wide = matrix.new_full((rows, 2 * columns), math.nan)
        wide[:, ::2] = matrix
        return wide[:, ::2]
    if layout == "expanded rows":
        return matrix[:1].expand(rows, columns)
    if layout == "expanded columns":
        return matrix[:, :1].expand(rows, columns)
    return matrix


def worst(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, addend: torch.Tensor | None) -> float:
    """The distance to the exact product relative to |x| |W|ᵀ + |addend|, which unlike the product itself
    cannot cancel.
    """
    factors = [x.double(), weight.double(), torch.zeros(()).double() if addend is None else addend.double()]
    exact, size = (a @ b.mT + c for a, b, c in (factors, [factor.abs() for factor in factors]))
    assert got.shape == exact.shape
    return float((got.double() - exact).norm() / size.norm())


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_both_libraries_multiply_matrices_of_any_strides(library, x_layout, weight_layout, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    for (rows, width, outputs), added in product(SHAPES, ("nothing", "bias", "onto")):
        x, weight = (
            laid_out(torch.randn(rows, width), x_layout),
            laid_out(torch.randn(outputs, width), weight_layout),
        )
        addend = {"nothing": None, "bias": torch.randn(outputs), "onto": torch.randn(rows, outputs)}[added]
        if added == "onto":
            got, plain = gemm.linear(x, weight, onto=addend.clone()), torch.addmm(addend, x, weight.mT)
        else:
            got, plain = gemm.linear(x, weight, addend), F.linear(x, weight, addend)
        error, allowed = worst(got, x, weight, addend), 2 * worst(plain, x, weight, addend)
        assert error <= 2e-6, (rows, width, outputs, added)
        assert error <= max(allowed, UNIT), (rows, width, outputs, added)  # one rounding more is no worse


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "every other"])
def test_only_the_addend_may_be_overwritten(library, layout, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    x, weight, bias = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)
    before = [tensor.clone() for tensor in (x, weight, bias)]
    onto = laid_out(torch.randn(6, 4), layout)
    kept = onto.clone()
    assert worst(gemm.linear(x, weight, onto=onto), x, weight, kept) < UNIT
    gemm.linear(x, weight, bias)
    assert all(torch.equal(now, then) for now, then in zip((x, weight, bias), before, strict=True))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
def test_a_bias_may_be_strided_or_expanded(library, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    for bias in (torch.randn(8)[::2], torch.randn(1).expand(4)):
        assert worst(gemm.linear(x, weight, bias), x, weight, bias) < UNIT


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_products(library, rows, width, outputs, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    x, weight, bias, onto = (
        torch.randn(rows, width),
        torch.randn(outputs, width),
        torch.randn(outputs),
        torch.randn(rows, outputs),
    )
    assert torch.equal(gemm.linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(gemm.linear(x, weight, onto=onto.clone()), torch.addmm(onto, x, weight.mT))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
def test_equal_inputs_give_equal_bits(library, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    x, weight, bias = torch.randn(70, 130), torch.randn(50, 130), torch.randn(50)
    first = gemm.linear(x, weight, bias)
    assert all(torch.equal(gemm.linear(x, weight, bias), first) for _ in range(50))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_pytorch(dtype, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(gemm, "_onednn", lambda *_: pytest.fail("oneDNN was called"))
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((6, 5), (4, 5), (4,)))
    assert torch.equal(gemm.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("library", gemm.LIBRARIES)
@pytest.mark.parametrize("biased", [True, False])
def test_in_bf16_onednn_adds_the_bias_itself(library, biased, monkeypatch):
    """PyTorch would copy it to every row; without one both do the same."""
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    if not gemm._onednn_agrees(torch.bfloat16):
        pytest.skip("no oneDNN in bf16")
    operator, asked = gemm._onednn, []
    monkeypatch.setattr(gemm, "_onednn", lambda *arguments: (asked.append(1), operator(*arguments))[1])
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((60, 50), (40, 50), (80,)))
    strided = bias[::2] if biased else None
    for matrix in (weight, weight.mT.contiguous().mT):
        result = gemm.linear(x, matrix, strided)
        exact = F.linear(x.double(), weight.double(), strided.double() if biased else None)
        assert result.dtype == torch.bfloat16
        assert torch.linalg.norm(result - exact) < 3e-3 * torch.linalg.norm(exact)
    onto = torch.randn(60, 40).bfloat16()
    assert torch.equal(gemm.linear(x, weight, onto=onto.clone()), torch.addmm(onto, x, weight.mT))
    assert len(asked) == 2 * biased


@pytest.mark.usefixtures("onednn")
def test_an_unknown_library_is_named(monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "cublas")
    with pytest.raises(ValueError, match="MINGLE_CPU_GEMM='cublas': expected one of mkl, onednn"):
        gemm.linear(torch.randn(2, 3), torch.randn(4, 3))


def missing(*_):
    raise NotImplementedError("no such operator")


def refusing(*_):
    raise RuntimeError("could not create a primitive")


def garbage(x, weight, bias, onto=None):
    return torch.full((len(x), len(weight)), 0.5)


def wrong_shape(x, weight, bias, onto=None):
    return torch.zeros(len(x), len(weight) + 1)


def wrong_dtype(x, weight, bias, onto=None):
    return F.linear(x, weight, bias).double() + (0 if onto is None else onto)


def wrong_where_strided(x, weight, bias, onto=None):
    return F.linear(x, torch.as_strided(weight, weight.shape, (weight.shape[1], 1)), bias) + (
        0 if onto is None else onto
    )


def addend_lost(x, weight, bias, onto=None):
    return F.linear(x, weight, bias)


@pytest.mark.parametrize(
    "operator", [missing, refusing, garbage, wrong_shape, wrong_dtype, wrong_where_strided, addend_lost]
)
def test_an_operator_that_is_missing_or_wrong_is_passed_over_in_silence(operator, monkeypatch, caplog):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    asked = []
    monkeypatch.setattr(gemm, "_onednn", lambda *arguments: (asked.append(1), operator(*arguments))[1])
    x, weight, bias, onto = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4), torch.randn(6, 4)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(gemm.linear(x, weight, bias), F.linear(x, weight, bias))
            assert torch.equal(gemm.linear(x, weight, onto=onto.clone()), torch.addmm(onto, x, weight.mT))
        trials = len(asked)
        gemm.linear(x, weight, bias)
    assert 1 <= trials == len(asked) <= 3  # asked once, not at every call
    assert not caplog.records


def test_a_pytorch_without_the_operator_is_served(monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    assert torch.equal(gemm.linear(x, weight), F.linear(x, weight))


def test_a_part_of_a_wider_weight_is_not_given_to_onednn(onednn, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(gemm, "_onednn", refusing)
    x, whole = torch.randn(6, 5), torch.randn(7, 20)
    for weight in (whole[:, :5], whole.mT[:5].mT, whole[::2, :5]):
        torch.testing.assert_close(gemm.linear(x, weight), x @ weight.mT)
