"""Which library multiplies on the CPU is decided once, and kept."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from gemm_choices import forget

from mingle.kernels import gemm

pytestmark = pytest.mark.usefixtures("own_choice")


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
        (1.0, 1.12, "mkl"),
        (3.0, 0.92, "mkl"),  # a busy moment decided
        (1.0, 1.13, "onednn"),
    ],
)
def test_later_processes_mend_a_choice_that_costs_a_tenth(first, later, expected, clock, tmp_path):
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


def test_processes_that_start_together_choose_alike(clock, monkeypatch, tmp_path):
    def slower_process() -> float:
        clock.ratios = [3.0]
        with monkeypatch.context() as patch:  # another one is ready while this one still measures
            patch.setattr(gemm, "_ratio", clock)
            gemm._chosen.__wrapped__(torch.get_num_threads())
        return 0.5

    monkeypatch.setattr(gemm, "_ratio", slower_process)
    assert gemm.library(256, 128, 128) == "onednn"
    (stored,) = json.loads((tmp_path / "cpu-gemm.json").read_text()).values()
    assert stored["library"] == "onednn" and set(stored["ratios"]) == {3.0}


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
    clock.ratios = [1.01]
    if gemm._onednn_agrees(torch.float32):
        assert gemm.explanation() == "mkl: oneDNN 1.01 times as fast, median of 2 rounds"
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_onednn_agrees", lambda dtype: False)
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
    [(0.4, "mkl"), (1.0, "mkl"), (1.02, "mkl"), (1.03, "onednn"), (2.0, "onednn")],
)
def test_onednn_must_be_faster(ratio, expected, clock):
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
