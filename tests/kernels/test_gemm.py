"""Dense CPU products: either library gives the product for any strides, and which one is used is decided once
and kept.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mingle.kernels import gemm

# rows, width, outputs
SHAPES = ((5, 7, 9), (1, 7, 9), (5, 7, 1), (5, 1, 9), (1, 1, 1), (33, 65, 31), (64, 100, 48))
LAYOUTS = ("contiguous", "transposed", "sliced", "every other", "expanded rows", "expanded columns")
UNIT = 2.0**-23


def forget() -> None:
    for cached in (gemm._store, gemm._chosen, gemm._onednn_agrees):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.delenv("MINGLE_CPU_GEMM", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def onednn() -> None:
    if not gemm._onednn_agrees():
        pytest.skip("this PyTorch has no oneDNN linear operator")


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_left_to_pytorch(dtype, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(gemm, "_onednn", lambda *_: pytest.fail("oneDNN was called"))
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((6, 5), (4, 5), (4,)))
    assert torch.equal(gemm.linear(x, weight, bias), F.linear(x, weight, bias))


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


class Clock:
    """In place of `_ratio`: how much faster oneDNN is said to be, round by round; the last value stays."""

    def __init__(self, *ratios: float) -> None:
        self.ratios, self.asked = list(ratios), 0

    def __call__(self) -> float:
        self.asked += 1
        return self.ratios[0] if len(self.ratios) == 1 else self.ratios.pop(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(3.0)
    monkeypatch.setattr(gemm, "_ratio", clock)
    return clock


def test_a_machine_is_timed_once_for_products_of_all_sizes(clock):
    for sizes in ((129, 100, 128), (256, 128, 128), (5000, 3072, 768), (10**6, 2000, 1024)):
        assert gemm.library(*sizes) == "onednn"
    assert clock.asked == 2  # rounds that agree


def test_rounds_are_timed_until_two_agree(clock):
    clock.ratios = [0.5, 2.0, 1.0, 3.0, 1.5, 1.55, 9.0]
    assert gemm.library(256, 128, 128) == "onednn"  # 1.5, the median of six
    assert clock.asked == 6


def test_rounds_that_never_agree_come_to_an_end(clock):
    clock.ratios = [0.5, 2.0] * 20
    assert gemm.library(256, 128, 128) == "mkl"  # five times 0.5, four times 2
    assert clock.asked == gemm._ROUNDS


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        (3.0, 1.0, "onednn"),  # no gain, but the same bits
        (1.0, 1.3, "mkl"),
        (3.0, 0.7, "mkl"),  # a busy moment decided
        (1.0, 1.6, "onednn"),
    ],
)
def test_later_processes_mend_a_choice_that_costs_a_fifth(first, later, expected, clock, tmp_path):
    clock.ratios = [first]
    start = gemm.library(256, 128, 128)
    clock.ratios = [later]
    found = []
    for _ in range(12):
        forget()
        found.append(gemm.library(256, 128, 128))
        assert gemm.library(512, 512, 512) == found[-1]  # the same as long as a process lives
    assert found[0] == start and found[-1] == expected
    assert clock.asked == gemm._ROUNDS
    (stored,) = json.loads((tmp_path / "cpu-gemm.json").read_text()).values()
    assert stored["library"] == expected and len(stored["ratios"]) == gemm._ROUNDS


@pytest.mark.parametrize(
    "nonsense",
    [
        "onednn",
        None,
        {"library": "cublas", "ratios": [3.0]},
        {"library": "onednn", "ratios": []},
        {"library": "onednn", "ratios": ["fast"]},
        {"library": "onednn", "ratios": 3.0},
        {"library": "onednn"},
        ["onednn", [3.0]],
    ],
    ids=str,
)
def test_a_stored_choice_that_means_nothing_is_measured_again(nonsense, clock, tmp_path):
    gemm.library(256, 128, 128)
    path = tmp_path / "cpu-gemm.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), nonsense)))
    forget()
    assert gemm.library(256, 128, 128) == "onednn"
    assert clock.asked == 4
    assert list(json.loads(path.read_text()).values()) == [{"library": "onednn", "ratios": [3.0, 3.0]}]


def test_a_choice_is_explained(clock, monkeypatch):
    clock.ratios = [1.1]
    if gemm._onednn_agrees():
        assert gemm.explanation() == "mkl: oneDNN 1.10 times as fast, median of 2 rounds"
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_onednn_agrees", lambda: False)
        assert gemm.explanation() == "mkl: this PyTorch has no operator of oneDNN that gives the same"
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    assert gemm.explanation() == "onednn: MINGLE_CPU_GEMM=onednn"


def test_another_number_of_threads_is_another_machine(clock, monkeypatch, tmp_path):
    for threads in (1, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        gemm.library(256, 128, 128)
    assert clock.asked == 4
    assert len(json.loads((tmp_path / "cpu-gemm.json").read_text())) == 2


def test_small_products_are_never_timed(clock, tmp_path):
    x, weight = torch.randn(64, 127), torch.randn(128, 127)
    assert gemm.library(64, 128, 127) == "mkl"
    assert torch.equal(gemm.linear(x, weight), F.linear(x, weight))
    assert not clock.asked
    assert not any(tmp_path.iterdir())
    gemm.library(64, 128, 128)  # 2²⁰ multiplications
    assert clock.asked


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.4, "mkl"), (1.0, "mkl"), (1.19, "mkl"), (1.2, "mkl"), (1.21, "onednn"), (2.0, "onednn")],
)
def test_onednn_must_be_a_fifth_faster(ratio, expected, clock):
    clock.ratios = [ratio]
    assert gemm.library(256, 128, 128) == expected


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("ratio", "calls"), [(0.5, 0), (3.0, 1)])
def test_the_choice_decides_who_multiplies(ratio, calls, clock, monkeypatch):
    clock.ratios = [ratio]
    operator, counted = gemm._onednn, []
    monkeypatch.setattr(gemm, "_onednn", lambda *arguments: (counted.append(1), operator(*arguments))[1])
    gemm.linear(torch.randn(256, 128), torch.randn(128, 128))
    assert len(counted) == calls


def test_what_was_measured_is_overruled_by_the_environment(clock, monkeypatch, tmp_path):
    gemm.library(256, 128, 128)
    monkeypatch.setenv("MINGLE_CPU_GEMM", "mkl")
    assert gemm.library(256, 128, 128) == "mkl"
    assert gemm.library(512, 128, 128) == "mkl"
    assert clock.asked == 2


@pytest.mark.usefixtures("onednn")
def test_the_timing_is_a_ratio_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    assert 0 < gemm._ratio() < math.inf
    assert torch.equal(torch.get_rng_state(), before)


def test_a_part_of_a_wider_weight_is_not_given_to_onednn(onednn, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(gemm, "_onednn", refusing)
    x, whole = torch.randn(6, 5), torch.randn(7, 20)
    for weight in (whole[:, :5], whole.mT[:5].mT, whole[::2, :5]):
        torch.testing.assert_close(gemm.linear(x, weight), x @ weight.mT)
