"""No function of `mingle.linalg` minds how its arguments lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import dense, layouts
from torch import Tensor

from mingle import linalg
from mingle.nn.low_rank_expert import LowRankExpert

# sizes beyond and below the width up to which a library decomposes matrices whole
LEADING, SIZES = [(), (2,), (2, 3)], [(5, 7), (45, 40), (40, 90)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(rows, columns)).Q


def product(triplets: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What of a decomposition is unique: U diag(S) Vh and S."""
    U, S, Vh = triplets
    return (U * S.unsqueeze(-2)) @ Vh, S


def svd(M: Tensor) -> tuple[Tensor, Tensor]:
    return product(linalg.svd_lowrank(M, 3, oversample=4))


def svd_of_a_list(*matrices: Tensor) -> list[Tensor]:
    parts = zip(*linalg.svd_lowrank(list(matrices), 3, oversample=4), strict=True)
    return [tensor for triplets in parts for tensor in product(triplets)]


def directions(first: Tensor, second: Tensor) -> Tensor:
    found = linalg.InputDirections(first.shape[1]).including(first).including(second).top(2)
    return found @ found.mT


def subspace(x: Tensor) -> Tensor:
    found = linalg.top_subspace(x, 2)
    return found @ found.mT


def expert(delta: Tensor) -> Tensor:
    return LowRankExpert.from_dense(delta, 2).delta()


def calls(leading: tuple[int, ...], m: int, n: int) -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """The public functions and arguments for them; where a batch is taken, `leading` ones."""
    M, k = normal(*leading, m, n), min(m, n)
    triplets = [normal(*leading, m, k), normal(*leading, k).abs(), normal(*leading, k, n)]
    count = torch.randint(k, leading, generator=torch.Generator().manual_seed(1))
    covariance = normal(n, n) @ normal(n, n).mT
    return {
        "svd_lowrank": (svd, [M]),
        "svd_lowrank of a list": (svd_of_a_list, [normal(m, n), normal(n, 4), normal(m, n, seed=1)]),
        "gram_svd": (lambda M: product(linalg.gram_svd(M)), [M]),
        "factored_svd": (
            lambda B, A: product(linalg.factored_svd(B, A)),
            [normal(*leading, m, 3), normal(*leading, 3, n)],
        ),
        "project_out": (lambda *given: linalg.project_out(*given, 2), [M, *triplets]),
        "project_out of a batch": (
            lambda *given: linalg.project_out(*given, drop_diagonal=True),
            [M, *triplets, count],
        ),
        "effective_rank": (linalg.effective_rank, [normal(k).abs()]),
        "effective_ranks": (linalg.effective_ranks, [normal(*leading, k).abs()]),
        "extend_basis": (linalg.extend_basis, [orthonormal(n, 3), normal(n, 2)]),
        "top_subspace": (subspace, [covariance]),
        "InputDirections": (directions, [normal(4, n), normal(3, n)]),
        "from_dense": (expert, [normal(m, n)]),
    }


@pytest.mark.parametrize("name", calls((), 5, 7))
def test_strides_of_every_argument_of_every_function_do_not_matter(name: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.data(), st.sampled_from(LEADING), st.sampled_from(SIZES))
    def check(data: st.DataObject, leading: tuple[int, ...], size: tuple[int, int]) -> None:
        function, arguments = calls(leading, *size)[name]
        strided = [data.draw(layouts).of(tensor) for tensor in arguments]
        got, expected = function(*strided), function(*map(dense, strided))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)

    check()
