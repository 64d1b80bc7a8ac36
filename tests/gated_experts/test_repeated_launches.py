"""Launches that are recorded and repeated, with kernels that only note what they are launched with."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from mingle.kernels import launches, tiles

STREAM = 7


class Kernel:
    """Stands for a kernel of Triton and for what it compiles to; notes every launch with addresses."""

    arg_names = ("x", "offset", "out", "SIZE")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.by_triton = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, num_warps: int, **constants: Any) -> Kernel:
            self.by_triton += 1
            arguments = (*values, *constants.values())
            addresses = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
            self.run(
                *(*grid, 1, 1)[:3], STREAM, self.function, self.packed_metadata, None, None, None, *addresses
            )
            return self

        return launch

    def run(self, *arguments: Any) -> None:
        self.launches.append(tuple(map(_plain, arguments)))


def _plain(value: Any) -> Any:
    """A descriptor by what Triton reads of it."""
    if not isinstance(value, TensorDescriptor):
        return value
    return value.base.data_ptr(), value.shape, value.strides, value.block_shape, value.padding


class Launcher(NamedTuple):
    call: Any
    kernel: Kernel


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr(launches, "_stream", lambda tensor: STREAM)


@pytest.fixture
def launcher(stream):
    """Two launches: x and a part of y, then y and None."""
    kernel = Kernel()

    @launches.repeated
    def call(x: Tensor, y: Tensor, size: int = 3, *, copied: bool = False) -> tuple[Tensor, Tensor]:
        made = x.new_empty(4, size, dtype=torch.float16)
        rest = x.new_empty(0, 2)
        if copied:
            x = x + 1
        launches.launch(kernel, (5,), x, size, y[1:], SIZE=size, num_warps=4)
        launches.launch(kernel, (2, 3), y.mT, None, made, SIZE=1, num_warps=8)
        return rest, made

    return Launcher(call, kernel)


def expected(x: Tensor, y: Tensor, made: Tensor, size: int) -> list[tuple[Any, ...]]:
    common = STREAM, "function", "metadata", None, None, None
    return [
        (5, 1, 1, *common, x.data_ptr(), size, y[1:].data_ptr(), size),
        (2, 3, 1, *common, y.data_ptr(), None, made.data_ptr(), 1),
    ]


def matrices(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


def test_later_calls_launch_the_same_on_their_own_tensors(launcher):
    for number in range(5):
        x, y = matrices(6, 4)
        rest, made = launcher.call(x, y, 8)
        assert rest.shape == (0, 2) and rest.dtype == torch.float32
        assert made.shape == (4, 8) and made.dtype == torch.float16
        assert launcher.kernel.launches[2 * number :] == expected(x, y, made, 8)
    assert launcher.kernel.by_triton == 2 * 2  # the first call, and the one that was recorded


def test_a_tensor_that_was_passed_twice_need_not_be_again(launcher):
    for _ in range(2):
        x, _ = matrices(6, 4)
        launcher.call(x, x)
    launcher.kernel.launches.clear()
    x, y = matrices(6, 4)
    _, made = launcher.call(x, y)
    assert launcher.kernel.by_triton == 4
    assert launcher.kernel.launches == expected(x, y, made, 3)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: ((x[:5], y), {}),
        lambda x, y: ((x.mT.contiguous().mT, y), {}),
        lambda x, y: ((x.double(), y), {}),
        lambda x, y: ((torch.randn(25)[1:].view(6, 4), y), {}),
        lambda x, y: ((x, y, 4), {}),
        lambda x, y: ((x, y), {"size": 4}),
        lambda x, y: ((x, y), {"size": 3}),
        lambda x, y: ((x, y), {"copied": True}),
    ],
    ids=["size", "strides", "dtype", "alignment", "number", "keyword", "by keyword", "flag"],
)
def test_another_kind_of_call_is_recorded_for_itself(launcher, other):
    for _ in range(3):
        launcher.call(*matrices(6, 4))
    assert launcher.kernel.by_triton == 4
    args, kwargs = other(*matrices(6, 4))
    launcher.call(*args, **kwargs)
    assert launcher.kernel.by_triton == 6


def test_of_launchers_that_call_each_other_the_outermost_is_recorded(stream):
    kernel = Kernel()

    @launches.repeated
    def inner(x: Tensor) -> Tensor:
        made = x.new_empty(4)
        launches.launch(kernel, (1,), x, 0, made, SIZE=1, num_warps=4)
        return made

    @launches.repeated
    def outer(x: Tensor) -> Tensor:
        return inner(inner(x))

    for _ in range(3):  # which is then repeated when it is called by itself
        inner(torch.randn(4))
    assert kernel.by_triton == 2
    for number in range(1, 5):
        kernel.launches.clear()
        x = torch.randn(4)
        made = outer(x)
        first, second = (launch[-4:] for launch in kernel.launches)
        assert first[0] == x.data_ptr() and first[2] == second[0] != x.data_ptr()
        assert second[2] == made.data_ptr()
        assert kernel.by_triton == (2 if number == 1 else 4)


def test_what_lies_between_launches_shares_one_piece_of_memory_and_no_byte_of_it(stream):
    kernel, sizes = Kernel(), (3, 0, 700, 5)

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        between = [x.new_empty(size, dtype=torch.float64) for size in sizes]
        made = x.new_empty(4)
        for one in between:
            launches.launch(kernel, (1,), x, 0, one, SIZE=1, num_warps=4)
        launches.launch(kernel, (1,), between[-1][2:], 0, made, SIZE=1, num_warps=4)
        return made

    for _ in range(2):
        call(torch.randn(4))
    kernel.launches.clear()
    made = call(torch.randn(4))
    assert kernel.by_triton == 2 * 5
    *outs, (begin, _, result, _) = (launch[-4:] for launch in kernel.launches)
    begins = [out[2] for out in outs]
    for here, size, after in zip(begins, sizes, begins[1:], strict=False):
        assert here + 8 * size <= after and (after - begins[0]) % 16 == 0
    assert begin == begins[-1] + 16 and result == made.data_ptr()


def test_descriptors_move_along(stream):
    kernel = Kernel()

    def described(matrix: Tensor) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [2, 4])

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        made = x.new_empty(6, 4)
        launches.launch(
            kernel, (1,), described(x[2:]), described(x.view(6, 8)), described(made), SIZE=1, num_warps=4
        )
        return made

    for number in range(4):
        x = torch.randn(12, 4)
        made = call(x)
        expected = [described(x[2:]), described(x.view(6, 8)), described(made)]
        assert kernel.launches[number][-4:] == (*map(_plain, expected), 1)
    assert kernel.by_triton == 2


def test_calls_that_compute_or_copy_tensors_are_never_repeated(launcher):
    for _ in range(4):
        launcher.call(*matrices(6, 4), copied=True)
    assert launcher.kernel.by_triton == 8


@pytest.mark.parametrize("elsewhere", ["a tensor made before", "not a number"])
def test_arguments_from_elsewhere_are_never_repeated(stream, elsewhere):
    kernel = Kernel()
    value = torch.randn(3) if elsewhere == "a tensor made before" else {}

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        made = x.new_empty(1)
        launches.launch(kernel, (1,), x, value, made, SIZE=1, num_warps=4)
        return made

    for _ in range(4):
        call(torch.randn(3))
    assert kernel.by_triton == 4


@pytest.mark.parametrize("returned", ["its argument", "a view"])
def test_calls_that_return_other_than_new_tensors_are_never_repeated(stream, returned):
    kernel = Kernel()

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        made = x.new_empty(4)
        launches.launch(kernel, (1,), x, 0, made, SIZE=1, num_warps=4)
        return x if returned == "its argument" else made[:2]

    for _ in range(4):
        call(torch.randn(3))
    assert kernel.by_triton == 4


def test_a_search_is_not_repeated_and_what_it_found_is_recorded_anew(launcher, monkeypatch, tmp_path):
    for _ in range(3):
        launcher.call(*matrices(6, 4))
    monkeypatch.setattr(tiles, "_searches", tiles.searches() + 1)
    launcher.call(*matrices(6, 4))
    assert launcher.kernel.by_triton == 6
    monkeypatch.undo()
    assert not tiles.searching()
    with tiles._forced(tiles.ADDING):
        assert tiles.searching()


def test_errors_leave_no_recording(stream):
    kernel, broken = Kernel(), [False, True, False, False, False]

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        made = x.new_empty(4)
        launches.launch(kernel, (1,), x, 0, made, SIZE=1, num_warps=4)
        if broken.pop(0):
            raise RuntimeError("out of memory")
        return made

    call(torch.randn(3))
    with pytest.raises(RuntimeError, match="out of memory"):
        call(torch.randn(3))
    for _ in range(3):
        call(torch.randn(3))
    assert kernel.by_triton == 3


def test_nothing_is_repeated_without_a_gpu():
    kernel = Kernel()

    @launches.repeated
    def call(x: Tensor) -> Tensor:
        made = x.new_empty(4)
        launches.launch(kernel, (1,), x, 0, made, SIZE=1, num_warps=4)
        return made

    for _ in range(4):
        call(torch.randn(3))
    assert kernel.by_triton == 4


def test_many_kinds_of_calls_do_not_pile_up(launcher, monkeypatch):
    monkeypatch.setattr(launches, "_MOST", 3)
    for size in range(1, 20):
        for _ in range(2):
            launcher.call(*matrices(6, size))
    cells = launcher.call.__closure__
    kept = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, (dict, set))]
    assert len(kept) == 2 and all(len(one) <= 4 for one in kept)
