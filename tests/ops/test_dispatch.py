"""Which backend computes a call, what is said where it cannot, and the costs by which `auto` chooses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import problem

from mingle.functional import gated_experts
from mingle.kernels import chips
from mingle.kernels.gated_experts import reference
from mingle.ops import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass
class OnGpu:
    """What `dispatch` asks of a matrix on a GPU."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CUDA

    def element_size(self) -> int:
        return self.dtype.itemsize


def installed(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", triton)


# ---- backends


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_an_explicit_backend_is_taken_at_its_word(backend, used, monkeypatch):
    loops = []
    plain = reference.gated_experts
    monkeypatch.setattr(
        reference, "gated_experts", lambda *arguments: (loops.append("eager"), plain(*arguments))[1]
    )
    gated_experts(**problem(2, 9), backend=backend)
    assert (loops, used) == ((["eager"], []) if backend == "eager" else ([], ["LOW_RANK grouped"]))


H100 = chips.Chip("cuda", "NVIDIA H100", 90, 132, 232_448)
SPEED = chips.family(H100)


@pytest.fixture(autouse=True)
def _nothing_chosen_before():
    dispatch._faster.cache_clear()
    yield
    dispatch._faster.cache_clear()  # what was chosen by a model that a test replaced


@pytest.fixture
def _on_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "chip", lambda device: H100)


def test_an_explicit_backend_is_kept(monkeypatch):
    installed(monkeypatch, True)
    for backend in ("grouped", "triton"):
        assert dispatch.plan(backend, OnGpu((50, 768)), 1, 768, 512).backend == backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_auto_is_grouped_on_the_cpu(dtype, monkeypatch):
    installed(monkeypatch, True)
    assert dispatch.plan("auto", torch.empty(50, 768, dtype=dtype), 1, 768, 512).backend == "grouped"
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter is for tests that ask for it
    assert dispatch.plan("auto", torch.empty(50, 768, dtype=dtype), 1, 768, 512).backend == "grouped"


@pytest.mark.usefixtures("_on_an_h100")
def test_auto_takes_the_cheaper_backend_on_a_gpu(monkeypatch):
    installed(monkeypatch, True)
    for winner in ("triton", "grouped"):
        monkeypatch.setattr(
            dispatch, "seconds", lambda backend, *_, winner=winner: 1.0 if backend == winner else 2.0
        )
        dispatch._faster.cache_clear()
        assert dispatch.plan("auto", OnGpu((50, 768)), 1, 768, 512).backend == "auto"  # the operator asks
        assert dispatch.cheapest(OnGpu((50, 768)), 768, 1280) == winner
        assert dispatch.plan("auto", OnGpu((50, 768), torch.float64), 1, 768, 512).backend == "grouped"
        assert dispatch.cheapest(OnGpu((50, 768), torch.float64), 768, 1280) == "grouped"
    installed(monkeypatch, False)
    monkeypatch.setattr(dispatch, "seconds", lambda backend, *_: 1.0 if backend == "triton" else 2.0)
    assert dispatch.plan("auto", OnGpu((50, 768)), 1, 768, 512).backend == "grouped"


@pytest.mark.parametrize(
    "chip",
    [
        chips.Chip("cuda", "Tesla T4", 75, 40, 65_536),
        chips.Chip("cuda", "NVIDIA A100", 80, 108, 166_912),
        chips.Chip("cuda", "NVIDIA B200", 100, 148, 232_448),
        chips.Chip("hip", "AMD Instinct MI300X", 94, 304, 65_536),
    ],
    ids=lambda chip: chip.name,
)
def test_auto_is_grouped_on_chips_that_nobody_has_measured(chip, monkeypatch):
    installed(monkeypatch, True)
    monkeypatch.setattr(chips, "chip", lambda device: chip)
    assert dispatch.cheapest(OnGpu((50, 768)), 768, 1280) == "grouped"


@pytest.mark.parametrize(
    ("chip", "said"),
    [
        (H100, "used where the table of sm_90, measured on such a chip, holds it for faster"),
        (
            chips.Chip("cuda", "NVIDIA A100", 80, 108, 166_912),
            "not used by backend='auto': the table of sm_80 was not measured; backend='triton' uses it",
        ),
    ],
)
def test_what_serves_a_chip_is_explained(chip, said, monkeypatch):
    installed(monkeypatch, True)
    monkeypatch.setattr(chips, "chip", lambda device: chip)
    assert dispatch.explanation(CUDA) == said
    assert "on cpu" in dispatch.explanation(CPU)


@pytest.mark.usefixtures("_on_an_h100")
def test_the_model_is_asked_with_the_sizes_of_the_call(monkeypatch):
    installed(monkeypatch, True)
    asked = {}
    monkeypatch.setattr(dispatch, "seconds", lambda backend, *sizes: asked.setdefault(backend, sizes)[0])
    dispatch.cheapest(OnGpu((50, 768), torch.float32), 3072, 1280)
    assert asked == dict.fromkeys(("grouped", "triton"), (50, 768, 3072, 1280, 4, SPEED))


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CUDA, torch.float32, None),
        (CUDA, torch.float16, None),
        (CUDA, torch.bfloat16, None),
        (CUDA, torch.float64, "float32, float16 and bfloat16, not float64"),
        (CUDA, torch.complex64, "not complex64"),
        (CPU, torch.float32, "the tensors are on cpu"),
        (torch.device("meta"), torch.float32, "the tensors are on meta"),
        (CPU, torch.float64, "not float64"),
    ],
)
def test_what_keeps_the_kernels_from_running_is_said(device, dtype, reason, monkeypatch):
    installed(monkeypatch, True)
    said = dispatch.without_triton(device, dtype)
    assert said is None if reason is None else reason in said
    if reason is not None:
        x = (
            torch.empty(1, 4, dtype=dtype, device="meta")
            if device.type != "cpu"
            else torch.empty(1, 4, dtype=dtype)
        )
        with pytest.raises(RuntimeError, match="backend='triton' cannot run: "):
            dispatch.plan("triton", OnGpu((1, 4), dtype, device) if device == CUDA else x, 1, 4, 2)


def test_nothing_is_searched_for_while_a_layer_is_traced(monkeypatch):
    """torch.compile of PyTorch 2.11 breaks the graph at a search for a package."""

    def search(*arguments: object) -> None:
        raise AssertionError("a package is searched for")

    monkeypatch.setattr(importlib.util, "find_spec", search)
    x = torch.empty(50, 768)
    for backend in ("auto", "grouped"):
        dispatch.plan(backend, x, 1, 768, 512)
    dispatch.without_triton(CUDA, torch.float32)


def test_the_interpreter_serves_the_cpu_but_for_bfloat16(monkeypatch):
    installed(monkeypatch, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.without_triton(CPU, torch.float32) is None
    assert dispatch.without_triton(CPU, torch.float16) is None
    assert "bfloat16 products wrongly" in dispatch.without_triton(CPU, torch.bfloat16)
    assert "not float64" in dispatch.without_triton(CPU, torch.float64)
    assert dispatch.plan("triton", torch.empty(1, 4), 1, 4, 2).backend == "triton"


def test_a_missing_package_is_named_before_anything_else(monkeypatch):
    installed(monkeypatch, False)
    for device, dtype in ((CUDA, torch.float32), (CPU, torch.float64)):
        assert dispatch.without_triton(device, dtype) == "the package triton is not installed"
    with pytest.raises(
        RuntimeError, match="backend='triton' cannot run: the package triton is not installed"
    ):
        gated_experts(**problem(2, 3), backend="triton")


BARE = """
import logging, sys
sys.modules["triton"] = None  # an import of it fails
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s", stream=sys.stdout)
import torch, mingle
assert not torch.cuda.is_available()
layer = mingle.MingleLinear.from_linear(torch.nn.Linear(4, 3))
layer.add_expert(torch.randn(1, 4), torch.randn(3, 1))
for dtype in (torch.float32, torch.float64):
    layer.to(dtype)(torch.randn(2, 5, 4, dtype=dtype)).sum().backward()
    mingle.linalg.svd_lowrank(torch.randn(40, 30, dtype=dtype), 2)
layer.to(torch.float32).backend = "triton"
M = torch.randn(5, 4)
for call in (lambda: layer(M), lambda: mingle.linalg.svd_lowrank(M, 2, backend="extension")):
    try:
        call()
    except RuntimeError as error:
        print("raised", error)
"""


def test_without_triton_compiler_or_gpu_import_works_and_one_message_gives_the_reason(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", BARE],
        env=environment | {"PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told, *raised = found.stdout.splitlines()
    reason = "the package triton is not installed"
    assert told == (
        f"mingle.ops.dispatch backend='auto' computes with dense products instead of the kernels: {reason}"
    )
    assert raised[0] == f"raised backend='triton' cannot run: {reason}"
    assert raised[1].startswith("raised backend='extension' cannot run: ") and len(raised) == 2


@pytest.mark.parametrize("triton", [True, False])
def test_auto_says_once_what_keeps_it_from_the_kernels_of_a_gpu(triton, monkeypatch, caplog):
    installed(monkeypatch, triton)
    dispatch._tell.cache_clear()
    for _ in range(3):
        dispatch.plan("auto", OnGpu((50, 768), torch.float64), 1, 768, 512)
    assert [record.levelname for record in caplog.records] == ([] if triton else ["WARNING"])


# ---- the cost model

sizes = st.fixed_dictionaries(
    dict(
        tokens=st.integers(1, 1 << 17),
        d_in=st.integers(1, 8192),
        d_out=st.integers(1, 8192),
        columns=st.integers(1, 8192),
        itemsize=st.sampled_from([2, 4]),
    )
)


@settings(deadline=None, derandomize=True)
@given(
    sizes,
    st.sampled_from(["tokens", "d_in", "d_out", "columns", "itemsize"]),
    st.sampled_from(["grouped", "triton"]),
)
def test_more_work_never_costs_less(size, grown, backend):
    larger = size | {grown: min(2 * size[grown], 4) if grown == "itemsize" else 2 * size[grown]}
    assert (
        dispatch.seconds(backend, **larger, speed=SPEED) >= dispatch.seconds(backend, **size, speed=SPEED) > 0
    )


@pytest.mark.usefixtures("_on_an_h100")
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "experts", "itemsize", "fastest"),
    [
        (25216, 768, 768, 20, 2, "triton"),
        (25216, 768, 768, 20, 4, "grouped"),
        (16 * 2048, 4096, 4096, 8, 2, "triton"),
        (800, 768, 3072, 8, 2, "triton"),
        (50, 768, 768, 20, 2, "triton"),
        (1, 4096, 4096, 8, 2, "triton"),
    ],
)
def test_the_fastest_on_an_h100_without_a_cuda_graph_is_taken(
    tokens, d_in, d_out, experts, itemsize, fastest, monkeypatch
):
    """As measured (bench/results); where the host decides, repeated launches take it less."""
    installed(monkeypatch, True)
    x = OnGpu((tokens, d_in), torch.bfloat16 if itemsize == 2 else torch.float32)
    assert dispatch.cheapest(x, d_out, 64 * experts) == fastest


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize(
    ("floor", "size"), [(162e-6, (25216, 768, 768, 1280, 2)), (2.5e-3, (25216, 768, 768, 1280, 4))]
)
def test_no_modelled_time_is_below_the_hardware_limit(backend, floor, size):
    assert floor <= dispatch.seconds(backend, *size, SPEED)
