"""Launches recorded once and repeated, without what a launcher and Triton do on the host at every call.

A launcher allocates tensors and launches kernels.  What it does depends on its arguments' sizes, strides,
dtypes and alignments, and not on their values or addresses; so a call like an earlier one repeats the earlier
one's allocations and launches with other addresses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from mingle.kernels import tiles

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 4096  # calls of one launcher that are remembered
_ALIGNED = 512  # bytes, as PyTorch's allocations are

_local = threading.local()


class _Address(int):
    """Where a tensor begins, for descriptors, which ask their base for it and for nothing else."""

    def data_ptr(self) -> int:
        return int(self)


def _moved(descriptor: Any, address: int) -> Any:
    """A descriptor of the same kind of matrix that begins at `address`; its checks are not repeated."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=_Address(address))
    return moved


class _Launch(NamedTuple):
    """One launch: Triton's compiled kernel, and its arguments but for the addresses."""

    run: Callable[..., None]
    grid: tuple[Any, ...]
    function: tuple[Any, ...]  # the kernel's handle and what Triton calls its metadata
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]  # argument, root, bytes from the root's beginning
    described: list[tuple[int, int, int]]  # the same for arguments that are descriptors


_Allocated: TypeAlias = tuple[tuple[int, ...], torch.dtype]


class _Recording(NamedTuple):
    """What a call did.  Its roots are the tensors it got, those it returns and those it used in between."""

    returned: list[_Allocated]
    between: list[int]  # where in one piece of memory the others begin, in bytes
    scratch: int  # how large that is
    launches: list[_Launch]
    result: int | tuple[int, ...]  # which of `returned`

    def repeat(self, tensors: list[torch.Tensor], stream: int) -> Any:
        new_empty = tensors[0].new_empty
        returned = [new_empty(size, dtype=dtype) for size, dtype in self.returned]
        begins = [root.data_ptr() for root in tensors + returned]
        if self.between:
            scratch = new_empty(self.scratch, dtype=torch.uint8)
            begin = scratch.data_ptr()
            begins += [begin + offset for offset in self.between]
        for run, grid, function, template, addresses, described in self.launches:
            arguments = template.copy()
            for argument, root, offset in addresses:
                arguments[argument] = begins[root] + offset
            for argument, root, offset in described:
                arguments[argument] = _moved(template[argument], begins[root] + offset)
            run(*grid, stream, *function, None, None, None, *arguments)
        if isinstance(self.result, int):
            return returned[self.result]
        return tuple([returned[place] for place in self.result])


class _Recorder(TorchDispatchMode):
    """Follows a call, and sees whether it can be repeated."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = list(given)  # kept, as an id may be used again
        self.places = {id(tensor): (root, 0) for root, tensor in enumerate(given)}  # root, offset
        self.made: dict[int, int] = {}  # the roots that were allocated
        self.begins = [tensor.data_ptr() for tensor in given]
        self.given = len(given)
        self.allocated: list[_Allocated] = []
        self.launches: list[_Launch] = []
        self.repeatable = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if func is torch.ops.aten.new_empty.default:
            self.made[id(made)] = len(self.begins)
            self._place(made, len(self.begins), 0)
            self.begins.append(made.data_ptr())
            self.allocated.append((tuple(made.shape), made.dtype))
        elif isinstance(made, torch.Tensor) and returns[0].alias_info and not func._schema.is_mutable:
            if id(args[0]) in self.places:
                root = self.places[id(args[0])][0]
                self._place(made, root, made.data_ptr() - self.begins[root])
        else:
            self.repeatable = False
        return made

    def _place(self, tensor: torch.Tensor, root: int, offset: int) -> None:
        self.tensors.append(tensor)
        self.places[id(tensor)] = root, offset

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        template: list[Any] = []
        addresses: list[tuple[int, int, int]] = []
        described: list[tuple[int, int, int]] = []
        for index, name in enumerate(kernel.arg_names):
            value = arguments[name]
            places, base = (
                (described, value.base) if isinstance(value, TensorDescriptor) else (addresses, value)
            )
            if isinstance(base, torch.Tensor):
                if id(base) not in self.places:
                    self.repeatable = False  # it comes from elsewhere
                    return
                places.append((index, *self.places[id(base)]))
                value = 0 if value is base else _moved(value, 0)
            elif not isinstance(value, (int, float, str, type(None))):
                self.repeatable = False
                return
            template.append(value)
        grid = (*grid, 1, 1)[:3]
        function = compiled.function, compiled.packed_metadata
        self.launches.append(_Launch(compiled.run, grid, function, template, addresses, described))

    def recording(self, result: Any) -> _Recording | None:
        results = result if isinstance(result, tuple) else (result,)
        if not self.repeatable or any(id(tensor) not in self.made for tensor in results):
            return None
        roots = [self.made[id(tensor)] for tensor in results]
        order = list(range(self.given)) + list(dict.fromkeys(roots))
        returned = [self.allocated[root - self.given] for root in order[self.given :]]
        between, scratch = list[int](), 0
        for root, (size, dtype) in enumerate(self.allocated, self.given):
            if root not in roots:
                order.append(root)
                between.append(scratch)
                scratch += -(-math.prod(size) * dtype.itemsize // _ALIGNED) * _ALIGNED
        places = {root: place for place, root in enumerate(order)}

        def moved(where: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
            return [(argument, places[root], offset) for argument, root, offset in where]

        launches = [
            one._replace(addresses=moved(one.addresses), described=moved(one.described))
            for one in self.launches
        ]
        chosen = tuple(places[root] - self.given for root in roots)
        return _Recording(
            returned, between, scratch, launches, chosen if isinstance(result, tuple) else chosen[0]
        )


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel; a launcher with `repeated` launches all of its kernels here."""
    compiled = kernel[grid](*arguments, **constants)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        recorder.launched(kernel, compiled, grid, named | constants)


def repeated(launcher: Callable[P, R]) -> Callable[P, R]:
    """`launcher`, recorded at the second call of a kind and repeated from the third on.

    Its first argument is a tensor.  It may depend on nothing but what `_kind` sees of its arguments, and
    launch by `launch` alone.  A call that does more with tensors than to allocate them by `Tensor.new_empty`
    and to take views is never repeated.  Nothing is without a GPU, or where somebody watches Triton's
    launches.  Launchers may call each other: the outermost is recorded.
    """
    recordings: dict[Any, _Recording | None] = {}
    seen: set[Any] = set()

    @wraps(launcher)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        stream = _stream(first)
        if stream is None or getattr(_local, "recorder", None) is not None:  # part of another's recording
            return launcher(*args, **kwargs)
        kind, tensors = _kind(args, kwargs)
        recording = recordings.get(kind)
        if recording is not None:
            return recording.repeat(tensors, stream)
        if kind in recordings:
            return launcher(*args, **kwargs)
        if len(seen) > _MOST:
            recordings.clear()
            seen.clear()
        if kind not in seen:
            seen.add(kind)
            return launcher(*args, **kwargs)
        result, recordings[kind] = _recorded(launcher, args, kwargs)
        return result

    return call


def _recorded(
    launcher: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[R, _Recording | None]:
    """What `launcher` returns, and the recording of the call; None where it could not be repeated."""
    given: list[torch.Tensor] = []

    def own(value: Any) -> Any:
        """Each tensor as an object of its own: one that is passed twice has two roots."""
        if not isinstance(value, torch.Tensor):
            return value
        given.append(value.detach())
        return given[-1]

    args, kwargs = tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}
    recorder = _Recorder(given)
    _local.recorder = recorder
    try:
        with recorder:
            result = launcher(*args, **kwargs)
    finally:
        _local.recorder = None
    return result, recorder.recording(result)


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    """All that a launcher may depend on, and the tensors among its arguments."""
    tensors: list[torch.Tensor] = []
    kind: list[Any] = [tiles.searches(), *kwargs]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            kind.append((value.dtype, value.shape, value.stride(), value.data_ptr() & 15))
        else:
            kind.append(value)
    first = tensors[0]
    kind.append(first.get_device())
    if first.dtype == torch.float32:
        kind.append(tiles.precision(first))
    return tuple(kind), tensors


def _stream(tensor: torch.Tensor) -> int | None:
    """The stream to launch on; None where launches can't be repeated."""
    if not tensor.is_cuda or tiles.searching():
        return None
    device = tensor.get_device()
    if torch._C._cuda_getDevice() != device or _watched():
        return None
    return torch._C._cuda_getCurrentRawStream(device)


def _watched() -> bool:
    """Whether somebody, such as a profiler, is told of Triton's launches."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
