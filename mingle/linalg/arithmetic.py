"""In what precision, and in which library, the products of a decomposition run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from mingle.kernels import gemm

#: Eigenvalues of a Gram matrix in float64 under this fraction of the largest are rounding errors: singular
#: values under 1e-7.
NOISE = 1e-14

P = ParamSpec("P")
R = TypeVar("R")

#: Entries of matrices that are decomposed together: 1 GiB in float64, and there will be a few copies.
_TOGETHER = 2**27


def ieee(function: Callable[P, R]) -> Callable[P, R]:
    """`function` without autograd and autocast, its fp32 products in IEEE arithmetic, not in TF32 or bf16."""

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision

    return exact


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., p, k] @ b [..., k, n]; single fp32 matrices on the CPU go to the faster of its libraries."""
    if a.dim() == b.dim() == 2 and a.dtype == torch.float32:
        return gemm.linear(a, b.mT)
    return a @ b


def gram(rows: Tensor) -> Tensor:
    """The inner products Y Yᵀ [..., k, k] of the rows of Y [..., k, n], in float64 whatever Y's dtype.

    In fp32 they would lose every direction under 3e-4 of the largest.
    """
    exact = rows.double()
    return exact @ exact.mT


def falling_eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., k] in falling order and eigenvectors as columns [..., k, k], in the dtype given."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1), vectors.flip(-1)


def buckets(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of matrices that are worth stacking.

    They are on one GPU, equal in shape and dtype, and not too large together.  A CPU works matrix by matrix:
    one at a time stays in its caches.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        alone = i if matrix.device.type == "cpu" else None
        groups.setdefault((matrix.shape, matrix.dtype, matrix.device, alone), []).append(i)
    for places in groups.values():
        count = max(1, _TOGETHER // max(1, matrices[places[0]].numel()))
        yield from (places[start : start + count] for start in range(0, len(places), count))


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[b, m, n], or a single matrix as it is, for which `product` has the faster libraries."""
    return matrices[0] if len(matrices) == 1 else torch.stack(list(matrices))
