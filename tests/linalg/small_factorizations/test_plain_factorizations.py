"""The factorisations in plain torch, and how they are registered."""

from __future__ import annotations

import math

import pytest
import torch

from mingle.ops import small_factorizations as small

F64, U = torch.float64, 2.0**-53


def gram(rows: int, n: int, batch: int = 2) -> torch.Tensor:
    Y = torch.randn(batch, rows, n, dtype=F64)
    return Y.mT @ Y


def shift(m: int, n: int) -> float:
    return 11 * (m * n + n * (n + 1)) * U


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 128])
def test_the_inverse_factor_orthonormalises(n, dtype):
    Y = torch.randn(3, 200, n, dtype=F64) * torch.logspace(0, -12, n, dtype=F64)
    inverse, flags = small.cholesky_inverse(Y.mT @ Y, shift(200, n), dtype)
    assert inverse.dtype == dtype and inverse.is_contiguous() and not flags.any()
    assert torch.equal(inverse, inverse.triu())
    Q = Y @ inverse.double()
    assert (Q.mT @ Q - torch.eye(n)).abs().max() < (1e-12 if dtype == F64 else 1e-5)


def test_zero_columns_stay_zero_and_missing_rank_is_shifted_away():
    Y = torch.randn(4, 60, 12, dtype=F64)
    Y[0, :, 3] = 0
    Y[1] = 0
    Y[2, :, 5] = Y[2, :, 2]
    inverse, flags = small.cholesky_inverse(Y.mT @ Y, shift(60, 12))
    assert flags.tolist() == [0, 0, 1, 0]
    assert not inverse[0, 3].any() and not inverse[0, :, 3].any() and not inverse[1].any()
    Q = (Y @ inverse)[0]
    assert (Q.mT @ Q - torch.eye(12).index_fill(0, torch.tensor(3), 0)).abs().max() < 1e-13
    assert inverse[2].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 4), (4, 1)])
def test_what_is_not_finite_is_flagged_and_stays_alone(value, place):
    G = gram(20, 5, 3)
    wrong = G.clone()
    wrong[1][place] = value
    inverse, flags = small.cholesky_inverse(wrong, shift(20, 5))
    assert flags.tolist() == [0, -1, 0] and not inverse[1].any()
    assert torch.equal(inverse[::2], small.cholesky_inverse(G, shift(20, 5))[0][::2])
    values, vectors, flags = small.eigh(wrong)
    assert (
        flags.tolist() == [0, -1, 0]
        and values[1].isnan().all()
        and torch.equal(vectors[1], torch.eye(5, dtype=F64))
    )
    assert torch.equal(values[::2], small.eigh(G)[0][::2])


def test_an_indefinite_matrix_is_flagged():
    G = torch.stack([torch.eye(3), torch.tensor([[1.0, 9, 0], [9, 1, 0], [0, 0, 1]]), -torch.eye(3)]).double()
    inverse, flags = small.cholesky_inverse(G, 1e-12)
    assert flags.tolist() == [0, -1, -1] and not inverse[1:].any()


def test_only_the_lower_triangle_is_read():
    G = gram(30, 7)
    half = G.tril() + torch.full_like(G, 7.0).triu(1)
    for a, b in zip(small.cholesky_inverse(G, 1e-12), small.cholesky_inverse(half, 1e-12), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(small.eigh(G), small.eigh(half), strict=True):
        assert torch.equal(a, b)


def test_eigenvalues_fall_and_are_not_negative():
    G = gram(5, 9)
    values, W, flags = small.eigh(G)
    assert not flags.any() and (values >= 0).all() and (values.diff() <= 0).all() and W.is_contiguous()
    torch.testing.assert_close(W * values.unsqueeze(1) @ W.mT, G)
    assert (W.mT @ W - torch.eye(9)).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-45, 3e-39, 1e-20, 0.5, 1.0, 3e38])
def test_the_largest_magnitude_is_brought_next_to_one(size, dtype):
    unit = torch.rand(2, 5, 6, dtype=dtype) - 0.5
    M = (unit / unit.abs().amax((1, 2), keepdim=True) * size).mT
    scaled, exponent, count, first = small.rescale(M)
    assert scaled.is_contiguous() and scaled.dtype == torch.float32 and exponent.dtype == torch.int32
    peak = scaled.abs().amax((1, 2))
    assert ((peak >= 0.5) & (peak <= 1)).all() and not count.any() and (first == -1).all()
    assert torch.equal(scaled, torch.ldexp(M.double(), -exponent[:, None, None].double()).float())


def test_rescale_counts_what_is_not_finite():
    M = torch.randn(3, 4, 5)
    M[1, 2, 3], M[1, 3, 0], M[2] = math.inf, math.nan, 0
    scaled, exponent, count, first = small.rescale(M)
    assert count.tolist() == [0, 2, 0] and first.tolist() == [-1, 13, -1] and exponent[2] == 0
    assert 0.5 <= scaled[1][scaled[1].isfinite()].abs().max() < 1
    assert torch.equal(scaled.isfinite(), M.isfinite())


def test_signs():
    U = torch.tensor([[1.0, -3, 0, -2], [-2, 1, 0, 2]])[None]
    Vh = torch.ones(1, 4, 3)
    product = U @ Vh
    small.fix_signs_(U, Vh)
    assert torch.equal(U[0], torch.tensor([[-1.0, 3, 0, 2], [2, -1, 0, -2]]))
    assert torch.equal(U @ Vh, product)


def test_effective_rank():
    falling = 0.9 ** torch.arange(64, dtype=F64)
    p = falling / falling.sum()
    spectra = torch.stack(
        [torch.ones(64, dtype=F64), torch.zeros(64, dtype=F64), torch.eye(64, dtype=F64)[5], falling]
    )
    assert small.effective_rank(spectra).tolist() == [64, 0, 1, int(math.exp(-(p * p.log()).sum()))]
    for k in range(1, 200):
        assert small.effective_rank(torch.full((1, k), 0.3, dtype=F64)).item() == k


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0)])
def test_nothing_to_do(shape):
    G = torch.zeros(shape, dtype=F64)
    assert [tuple(t.shape) for t in small.cholesky_inverse(G, 1e-12)] == [shape, shape[:1]]
    assert [tuple(t.shape) for t in small.eigh(G)] == [shape[:2], shape, shape[:1]]
    assert small.rescale(G)[0].shape == shape
    small.fix_signs_(G, G)
    assert small.effective_rank(G[:, 0] if shape[1] else G.flatten(1)).tolist() == [0] * shape[0]


def test_what_is_not_a_batch_of_gram_matrices_is_refused():
    for wrong in (torch.eye(3, dtype=F64), torch.zeros(1, 2, 3, dtype=F64), torch.zeros(1, 2, 2)):
        with pytest.raises(TypeError, match="expected Gram matrices"):
            small.cholesky_inverse(wrong, 1e-12)
        with pytest.raises(TypeError, match="expected Gram matrices"):
            small.eigh(wrong)
    with pytest.raises(TypeError, match="dtype of R"):
        small.cholesky_inverse(gram(5, 3), 1e-12, torch.float16)
    with pytest.raises(TypeError, match="float32 or float64"):
        small.rescale(torch.zeros(1, 2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="U .*Vh"):
        small.fix_signs_(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))


OPERATORS = {
    "cholesky_inverse": lambda: (gram(9, 4), 1e-13, torch.float32),
    "small_eigh": lambda: (gram(9, 4),),
    "rescale": lambda: (torch.randn(2, 5, 3).mT,),
    "fix_signs_": lambda: (torch.randn(2, 5, 3), torch.randn(2, 3, 4)),
    "effective_rank": lambda: (torch.rand(2, 5, dtype=F64),),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.mingle, name).default, OPERATORS[name]())


def test_compiled_and_eager_agree():
    def both(G: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*small.cholesky_inverse(G, 1e-13), *small.eigh(G))

    torch._dynamo.reset()
    G = gram(9, 4).requires_grad_()
    for a, b in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(G), both(G), strict=True):
        assert torch.equal(a, b) and not b.requires_grad
