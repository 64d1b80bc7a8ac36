"""Whole calls of a layer that repeat recorded launches, in Triton's interpreter."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton", reason="the kernels need Triton")

from mingle import functional
from mingle.kernels import launches, tiles
from mingle.nn.linear import MingleLinear

pytestmark = pytest.mark.interpret
_BYTES = 1 << 20  # more than any tensor here has
_REPEATED: list[str] = []  # recordings outlive a test


class _Interpreted:
    """Stands for a compiled kernel: runs it in the interpreter, on tensors that are given as addresses."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, dtypes: Sequence[torch.dtype | None]) -> None:
        self.kernel, self.dtypes = kernel, dtypes

    def run(self, *arguments: Any) -> None:
        grid, values = arguments[:3], arguments[-len(self.dtypes) :]
        pairs = zip(values, self.dtypes, strict=True)
        tensors = [value if dtype is None else _at(value, dtype) for value, dtype in pairs]
        self.kernel[grid](**dict(zip(self.kernel.arg_names, tensors, strict=True)))
        _REPEATED.append(self.kernel.fn.__name__)


def _at(address: int, dtype: torch.dtype) -> Tensor:
    if not address:  # of a tensor without elements
        return torch.empty(1, dtype=dtype)
    memory = (ctypes.c_char * _BYTES).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=1)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that a recording launches, by name."""

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        with _disable_current_modes():  # the interpreter computes with tensors
            kernel[grid](*arguments, **constants)
        recorder = getattr(launches._local, "recorder", None)
        if recorder is None:
            return
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        values = [named[name] for name in kernel.arg_names]
        dtypes = [value.dtype if isinstance(value, Tensor) else None for value in values]
        recorder.launched(kernel, _Interpreted(kernel, dtypes), grid, named)

    monkeypatch.setattr(launches, "launch", launch)
    monkeypatch.setattr(launches, "_stream", lambda tensor: 0)
    yield _REPEATED
    _REPEATED.clear()


@pytest.fixture
def shared_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs share the inner products of every block."""
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: tiles.Tile(16, 32, 16, 4, 1, splits=3))


def _layer(reduce: str, frozen: int) -> MingleLinear:
    generator = torch.Generator().manual_seed(1)
    layer = MingleLinear.from_linear(nn.Linear(96, 40), reduce, backend="triton")
    for _ in range(3):
        A, B = torch.randn(8, 96, generator=generator), torch.randn(40, 8, generator=generator)
        layer.add_expert(A / math.sqrt(96), B / math.sqrt(8))
    layer.set_trainable_gates(3 - frozen)
    return layer


def _results(layer: MingleLinear, x: Tensor, needs_x: bool) -> list[Tensor]:
    x = x.detach().requires_grad_(needs_x)
    y = layer(x)
    needed = [layer.gate_weight, layer.gate_bias, *[x] * needs_x]
    with torch.no_grad():
        untaped = layer(x)
    return [y, untaped, *torch.autograd.grad((y * y).sum(), needed)]


@pytest.mark.usefixtures("shared_products")
@pytest.mark.parametrize("reduce", ["token", "sample"])
@pytest.mark.parametrize("needs_x", [True, False])
def test_calls_that_repeat_launches_give_the_same_bits(reduce, needs_x, repeated, monkeypatch):
    layer = _layer(reduce, frozen=2)
    inputs = [torch.randn(2, 9, 96) for _ in range(4)]
    found = [_results(layer, x, needs_x) for x in inputs]
    assert {"shrink_kernel", "expand_kernel", "upstream_kernel"} <= set(repeated)
    assert "add_parts_kernel" in repeated  # what lies between launches
    monkeypatch.setattr(launches, "_stream", lambda tensor: None)
    for x, results in zip(inputs, found, strict=True):
        for result, expected in zip(results, _results(layer, x, needs_x), strict=True):
            assert torch.equal(result, expected)
        general = functional.gated_experts(
            x, *layer.tensors(), reduce=reduce, frozen_gates=2, backend="triton"
        )
        assert torch.equal(results[0], general)


def test_a_whole_forward_is_one_recording(repeated):
    layer = _layer("sample", frozen=2)
    with torch.no_grad():
        for _ in range(2):
            layer(torch.randn(3, 9, 96))
        assert not repeated
        layer(torch.randn(3, 9, 96))
    assert repeated == ["pool_kernel", "row_gates_kernel", "shrink_kernel", "expand_kernel"]
