"""The kernels of ``mingle._C`` for torch's CUDA tensors: their arguments, their outputs, the current stream.

The functions mirror those of `small_factorizations`, which call them where `serve` says so.  None waits for
the device, so that all can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mingle.ops import extension

#: The widest matrix that the kernels factorise.
MAX_SIZE = 128


def serve(tensor: Tensor, width: int = 1) -> bool:
    """Whether the kernels take a batch of matrices of this width on the tensor's device."""
    wanted = tensor.is_cuda and width <= MAX_SIZE and tensor.numel() > 0 and not _set_aside.get()
    return wanted and extension.load(tensor.device) is not None


def serve_eigh(gram: Tensor) -> bool:
    """`serve` for `small_eigh`, whose matrices lie in shared memory, of which some cards have less."""
    return serve(gram, gram.shape[-1]) and gram.shape[-1] <= _widest_eigh(gram.device)


@cache
def _widest_eigh(device: torch.device) -> int:
    module = extension.load(device)
    assert module is not None
    return int(module.widest_eigh(torch.cuda.current_device() if device.index is None else device.index))


_set_aside = ContextVar("_set_aside", default=False)


@contextmanager
def set_aside() -> Iterator[None]:
    """Leave everything inside the block to plain torch."""
    token = _set_aside.set(True)
    try:
        yield
    finally:
        _set_aside.reset(token)


def cholesky_inverse(gram: Tensor, shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, n, _ = gram.shape
    gram = gram.contiguous()
    inverse, flags = gram.new_empty(gram.shape, dtype=dtype), gram.new_empty(batch, dtype=torch.int32)
    single = dtype == torch.float32
    _module(gram).cholesky_inverse(
        gram.data_ptr(), batch, n, shift, single, inverse.data_ptr(), flags.data_ptr(), *_queue(gram)
    )
    return inverse, flags


def small_eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _ = gram.shape
    gram = gram.contiguous()
    values, vectors, flags = (
        gram.new_empty(batch, n),
        torch.empty_like(gram),
        gram.new_empty(batch, dtype=torch.int32),
    )
    _module(gram).small_eigh(
        gram.data_ptr(), batch, n, values.data_ptr(), vectors.data_ptr(), flags.data_ptr(), *_queue(gram)
    )
    return values, vectors, flags


def rescale(M: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, m, n = M.shape
    if M.stride(2) != 1:
        M = M.contiguous()
    module = _module(M)
    scaled, exponent = M.new_empty(M.shape, dtype=torch.float32), M.new_empty(batch, dtype=torch.int32)
    count, first = M.new_empty(batch, dtype=torch.int64), M.new_empty(batch, dtype=torch.int64)
    workspace = M.new_empty(module.rescale_workspace(batch, m, n), dtype=torch.uint8)
    outputs = [tensor.data_ptr() for tensor in (workspace, scaled, exponent, count, first)]
    module.rescale(
        M.data_ptr(),
        (M.stride(0), M.stride(1), 1),
        M.dtype == torch.float32,
        batch,
        m,
        n,
        *outputs,
        *_queue(M),
    )
    return scaled, exponent, count, first


def fix_signs_(U: Tensor, Vh: Tensor) -> None:
    batch, m, r = U.shape
    single = U.dtype == torch.float32
    _module(U).fix_signs(
        U.data_ptr(), U.stride(), Vh.data_ptr(), Vh.stride(), single, batch, m, r, Vh.shape[2], *_queue(U)
    )


def effective_rank(sigma: Tensor) -> Tensor:
    sigma = sigma.contiguous()
    ranks = sigma.new_empty(len(sigma), dtype=torch.int32)
    _module(sigma).effective_rank(sigma.data_ptr(), *sigma.shape, ranks.data_ptr(), *_queue(sigma))
    return ranks


def _module(tensor: Tensor) -> ModuleType:
    module = extension.load(tensor.device)
    if module is None:
        raise RuntimeError(f"the kernels cannot run: {extension.why_not(tensor.device)}")
    return module


def _queue(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and the handle of torch's current stream there."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
