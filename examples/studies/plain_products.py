"""Plain matrix products in Triton to hold the kernels' main loops against: the same tile, nothing else."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from offline import Launch
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def product_kernel(
    x_ptr, stride_xn, stride_xk,  # [N, K]
    w_ptr, stride_wm, stride_wk,  # [M, K]
    y_ptr,  # [N, M]
    N, K, M,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ, a tile each."""
    column_tiles = tl.cdiv(M, BLOCK_M)
    rows = tl.program_id(0) // column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) % column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, column_ok = (rows < N)[:, None], (columns < M)[None, :]
    x_rows, w_columns = x_ptr + rows[:, None] * stride_xn, w_ptr + columns[None, :] * stride_wm
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :] * stride_xk, mask=row_ok & (k < K)[None, :], other=0.0)
        w = tl.load(w_columns + k[:, None] * stride_wk, mask=column_ok & (k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc)  # [BLOCK_N, BLOCK_K] @ [BLOCK_K, BLOCK_M]
    tl.store(
        y_ptr + rows[:, None] * M + columns[None, :], acc.to(y_ptr.dtype.element_ty), mask=row_ok & column_ok
    )


@triton.jit(do_not_specialize=["programs"])
def described_product_kernel(
    x_desc, w_desc, y_desc,  # [N, K], [M, K], [N, M]
    N, K, M, programs,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors; each program works through many tiles."""
    column_tiles = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N) * column_tiles, programs):
        row, column = tile // column_tiles * BLOCK_N, tile % column_tiles * BLOCK_M
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([row, k]), w_desc.load([column, k]).T, acc)
        y_desc.store([row, column], acc.to(y_desc.dtype))


def beside(
    block: tuple[int, int, int], options: dict[str, int], described: bool, dtype: torch.dtype
) -> Launch:
    """The plain product of a block [rows, columns, depth of a step]; warps and stages are in `options`."""
    rows, columns, depth = block
    tokens, width, outputs = 16 * rows, 16 * depth, 16 * columns  # whole tiles

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, y = matrix(tokens, width), matrix(outputs, width), matrix(tokens, outputs)
    sizes: dict[str, Any] = dict(N=tokens, K=width, M=outputs, BLOCK_N=rows, BLOCK_M=columns, BLOCK_K=depth)
    if not described:
        strides = dict(stride_xn=width, stride_xk=1, stride_wm=width, stride_wk=1)
        pointers = dict(x_ptr=x, w_ptr=weight, y_ptr=y)
        return Launch(product_kernel, pointers | strides | sizes, options, (256,))

    def descriptor(matrix: torch.Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))

    operands = dict(
        x_desc=descriptor(x, rows, depth), w_desc=descriptor(weight, columns, depth),
        y_desc=descriptor(y, rows, columns), programs=132,
    )  # fmt: skip
    return Launch(described_product_kernel, operands | sizes, options, (132,))
