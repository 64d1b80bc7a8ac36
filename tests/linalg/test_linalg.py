"""Decompositions, projections and bases against dense float64 LAPACK."""

from __future__ import annotations

import math

import pytest
import torch

from mingle import linalg
from mingle.adaptation.input_directions import extend, input_directions
from mingle.linalg import basis, sketch, spectrum, subspace
from mingle.methods import experts
from mingle.methods.experts import concatenated, make_experts, project_out_experts
from mingle.nn.linear import LowRankExpert


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(
        torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q


def with_spectrum(m, n, sigma):
    k = len(sigma)
    return (
        orthonormal(m, k, 1)
        @ torch.diag(torch.as_tensor(sigma, dtype=torch.float64))
        @ orthonormal(n, k, 2).T
    )


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (2, 3, 6, 4)])
def test_svd_lowrank_is_the_best_approximation(shape):
    M = torch.randn(*shape, dtype=torch.float64)
    U, S, Vh = linalg.svd_lowrank(M, 3)
    full = torch.linalg.svdvals(M)
    torch.testing.assert_close(S, full[..., :3])
    residual = torch.linalg.matrix_norm(M - U * S.unsqueeze(-2) @ Vh)
    torch.testing.assert_close(residual, full[..., 3:].square().sum(-1).sqrt(), atol=1e-12, rtol=1e-10)


def test_svd_lowrank_signs_zeros_and_caps():
    M = with_spectrum(9, 7, [3.0, 1.0, 1e-9])
    U, S, Vh = linalg.svd_lowrank(M, 100)
    assert U.shape == (9, 7)
    assert Vh.shape == (7, 7)
    assert (S[2:] == 0).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = linalg.svd_lowrank(-M, 2)
    torch.testing.assert_close(flipped[0], U[:, :2])
    torch.testing.assert_close(flipped[2], -Vh[:2])
    assert linalg.svd_lowrank(M.float(), 2)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="rank=0"):
        linalg.svd_lowrank(M, 0)
    with pytest.raises(ValueError, match="non-finite"):
        linalg.svd_lowrank(M / 0, 2)


@pytest.mark.parametrize(("m", "n", "R"), [(20, 30, 6), (8, 9, 12), (7, 7, 7)])
def test_factored_svd(m, n, R):
    B, A = torch.randn(m, R, dtype=torch.float64), torch.randn(R, n, dtype=torch.float64)
    U, S, Vh = linalg.factored_svd(B, A)
    torch.testing.assert_close(U * S @ Vh, B @ A)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[: len(S)], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("sigma", "rank"),
    [([1.0], 1), ([1.0, 0.0, 0.0], 1), ([2.0, 2.0, 1e-30], 2), ([0.0, 0.0], 0), ([4.0, 2.0, 1.0], 2)],
)
def test_effective_rank(sigma, rank):
    assert linalg.effective_rank(torch.tensor(sigma)) == rank


def test_effective_rank_is_the_exponential_of_the_entropy():
    sigma = torch.linspace(0.01, 5, 200, dtype=torch.float64)
    p = (sigma / sigma.sum()).tolist()
    assert linalg.effective_rank(sigma) == int(math.exp(-sum(x * math.log(x) for x in p)))


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_projection_of_equation_3(drop_diagonal):
    experts = [
        LowRankExpert(torch.randn(3, 14, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64))
        for _ in range(2)
    ]
    delta = torch.randn(10, 14, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(sum(e.delta() for e in experts), full_matrices=True)
    alpha = linalg.effective_rank(S)
    assert 1 <= alpha < 6
    core = U.T @ delta @ Vh.T
    core[:alpha, :alpha] = 0
    if drop_diagonal:
        for j in range(alpha, 6):  # rank(S) = 6: null directions are never touched
            core[j, j] = 0
    got = project_out_experts(delta, *concatenated(experts), drop_diagonal=drop_diagonal)
    torch.testing.assert_close(got, U @ core @ Vh)


def test_projection_is_idempotent_and_annihilates_the_protected_block():
    expert = LowRankExpert(torch.randn(2, 9, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    once = project_out_experts(torch.randn(8, 9, dtype=torch.float64), expert.B, expert.A)
    torch.testing.assert_close(project_out_experts(once, expert.B, expert.A), once)
    U, S, Vh = torch.linalg.svd(expert.delta())
    leading = linalg.effective_rank(S)
    assert (U[:, :leading].T @ once @ Vh[:leading].T).abs().max() < 1e-13


def test_make_experts():
    delta = torch.randn(10, 14)
    expert = make_experts({"fc1": delta}, {"fc1": []}, rank=4)["fc1"]
    U, S, Vh = torch.linalg.svd(delta.double())
    torch.testing.assert_close(expert.delta().double(), U[:, :4] * S[:4] @ Vh[:4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expert.B.T @ expert.B, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(expert.A.norm(dim=1).double(), S[:4], rtol=1e-6, atol=0)  # float32 results
    assert expert.A.dtype == torch.float32


def test_top_subspace():
    tokens = torch.randn(500, 12, dtype=torch.float64) @ torch.diag(
        torch.linspace(3, 0.1, 12, dtype=torch.float64)
    )
    basis = linalg.top_subspace(tokens.T @ tokens, 3)
    exact = torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T
    torch.testing.assert_close(basis @ basis.T, exact @ exact.T, atol=1e-9, rtol=0)
    one = torch.zeros(5, 5)
    one[2, 2] = 4.0
    assert linalg.top_subspace(one, 3).shape == (5, 1)
    assert linalg.top_subspace(torch.zeros(5, 5), 3).shape == (5, 0)


def test_extend_basis_reveals_the_rank():
    old = orthonormal(12, 4)
    inside = old @ torch.randn(4, 3, dtype=torch.float64)
    assert linalg.extend_basis(old, inside).shape == (12, 4)
    mixed = torch.cat([inside, torch.randn(12, 2, dtype=torch.float64)], 1)
    grown = linalg.extend_basis(old, mixed)
    assert grown.shape == (12, 6)
    assert torch.equal(grown[:, :4], old)
    torch.testing.assert_close(grown.T @ grown, torch.eye(6, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(grown @ grown.T @ mixed, mixed)


def test_extend_basis_is_a_qr_factorisation_where_nothing_is_dropped():
    old, new = orthonormal(12, 4), torch.randn(12, 3, dtype=torch.float64)
    exact = torch.linalg.qr(torch.cat([old, new], 1)).Q
    torch.testing.assert_close(
        (linalg.extend_basis(old, new) * exact).sum(0).abs(), torch.ones(7, dtype=torch.float64)
    )


def test_extend_basis_ignores_scale_and_stops_at_the_whole_space():
    basis = torch.empty(5, 0, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        basis = linalg.extend_basis(basis, scale * torch.randn(5, 3, dtype=torch.float64))
    assert basis.shape == (5, 5)
    assert linalg.extend_basis(basis, torch.randn(5, 2, dtype=torch.float64)).shape == (5, 5)
    assert linalg.extend_basis(basis[:, :1], torch.zeros(5, 2, dtype=torch.float64)).shape == (5, 1)
    assert linalg.extend_basis(basis[:, :1].float(), torch.randn(5, 2)).dtype == torch.float32


# --- the whole spectrum from Gram matrices ---


@pytest.mark.parametrize(("m", "n"), [(30, 12), (12, 30), (17, 17)])
def test_gram_svd(m, n):
    M = torch.randn(2, m, n, dtype=torch.float64)
    U, S, Vh = linalg.gram_svd(M)
    torch.testing.assert_close(U * S.unsqueeze(-2) @ Vh, M)
    torch.testing.assert_close(S, torch.linalg.svdvals(M), rtol=1e-10, atol=1e-10)
    eye = torch.eye(min(m, n), dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(Vh @ Vh.mT, eye)


def test_gram_svd_sets_what_it_cannot_see_to_zero():
    U, S, Vh = linalg.gram_svd(with_spectrum(9, 7, [3.0, 1.0, 1e-12]))
    assert (S[2:] == 0).all()
    assert torch.isfinite(U).all() and torch.isfinite(Vh).all()
    assert linalg.gram_svd(torch.zeros(3, 4))[1].tolist() == [0, 0, 0]


def test_factored_svd_of_dependent_factors_and_of_batches():
    B, A = torch.randn(3, 40, 8, dtype=torch.float64), torch.randn(3, 8, 50, dtype=torch.float64)
    B[1, :, 4:] = B[1, :, :4]  # the same directions twice: no Cholesky factor
    A[2] = 0
    U, S, Vh = linalg.factored_svd(B, A)
    torch.testing.assert_close(U * S.unsqueeze(-2) @ Vh, B @ A)
    for i in range(3):
        torch.testing.assert_close(S[i], torch.linalg.svdvals(B[i] @ A[i])[:8], rtol=1e-9, atol=1e-6)
        torch.testing.assert_close(linalg.factored_svd(B[i], A[i])[1], S[i], rtol=1e-9, atol=1e-6)


def test_the_factored_and_the_dense_path_agree():
    B, A = torch.randn(40, 30, dtype=torch.float64), torch.randn(30, 45, dtype=torch.float64)
    assert spectrum._DENSE_SHARE * 40 < 30
    dense = linalg.factored_svd(B, A)
    delta = torch.randn(40, 45, dtype=torch.float64)
    projected = []
    for U, S, Vh in (dense, factored_without_forming(B, A)):
        projected.append(linalg.project_out(delta, U, S, Vh, linalg.effective_rank(S)))
    torch.testing.assert_close(*projected, rtol=0, atol=1e-8)


def factored_without_forming(B, A):
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT)
    return QB @ U, S, Vh @ QA.mT


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_projecting_a_batch_equals_one_by_one(drop_diagonal):
    B, A = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(3, 4, 25, dtype=torch.float64)
    A[1, 2:] = 0  # another effective rank
    delta = torch.randn(3, 20, 25, dtype=torch.float64)
    at_once = project_out_experts(delta, B, A, drop_diagonal=drop_diagonal)
    for i in range(3):
        torch.testing.assert_close(
            at_once[i],
            project_out_experts(delta[i], B[i], A[i], drop_diagonal=drop_diagonal),
            rtol=0,
            atol=1e-9,
        )


def test_projecting_in_single_precision():
    experts = [LowRankExpert(torch.randn(16, 96), torch.randn(80, 16)) for _ in range(2)]
    delta = torch.randn(80, 96)
    wide = [LowRankExpert(expert.A.double(), expert.B.double()) for expert in experts]
    exact = project_out_experts(delta.double(), *concatenated(wide))
    error = (project_out_experts(delta, *concatenated(experts)).double() - exact).norm() / exact.norm()
    assert error < 6e-7


def test_make_experts_groups_layers_as_a_gpu_does(monkeypatch):
    shapes = {"q": (20, 20), "k": (20, 20), "fc1": (40, 20), "fc2": (20, 40)}
    deltas = {name: torch.randn(shape) for name, shape in shapes.items()}
    earlier = {
        name: [LowRankExpert(torch.randn(3, shape[1]), torch.randn(shape[0], 3))]
        for name, shape in shapes.items()
    }
    expected = make_experts(deltas, earlier, rank=4)
    monkeypatch.setattr(experts, "buckets", lambda matrices: iter([[0, 1], [2], [3]]))
    grouped = make_experts(deltas, earlier, rank=4)
    for name in shapes:
        torch.testing.assert_close(grouped[name].delta(), expected[name].delta(), rtol=1e-5, atol=1e-5)


def test_make_experts_names_the_layer_with_nan():
    with pytest.raises(ValueError, match=r"'fc2' \[3, 4\] has non-finite entries: 1"):
        make_experts(
            {"fc1": torch.ones(3, 4), "fc2": torch.tensor([torch.nan] + 11 * [0.0]).view(3, 4)},
            {"fc1": [], "fc2": []},
            2,
        )


# --- orthonormal rows and random starts ---


@pytest.mark.parametrize("kind", ["generic", "graded", "deficient", "equal", "zero", "partly zero"])
def test_orthonormal_rows_whatever_the_rank(kind):
    rows = torch.randn(2, 12, 40, dtype=torch.float64)
    if kind == "graded":
        rows *= torch.logspace(0, -12, 12, dtype=torch.float64)[:, None]
    elif kind == "deficient":
        rows = torch.randn(2, 12, 3, dtype=torch.float64) @ torch.randn(2, 3, 40, dtype=torch.float64)
    elif kind == "equal":
        rows[:] = 1.0
    elif kind == "zero":
        rows.zero_()
    elif kind == "partly zero":
        rows[:, ::2] = 0
    for matrix in (rows, rows[0]):
        found = basis.orthonormal(matrix, 0, ["a", "b"][: len(matrix) if matrix.dim() == 3 else 1])
        assert basis.defect(found).max() < 1e-12
        outside = matrix - matrix @ found.mT @ found
        assert outside.norm() <= 1e-7 * matrix.norm()


def test_random_starts_are_standard_normal_and_independent_of_the_batch():
    device = torch.device("cpu")
    numbers = sketch.gaussian(7, ["a", "b", 3], 100, 200, device, torch.float64)
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
    assert abs((numbers**4).mean() - 3) < 0.15
    assert numbers.abs().max() < 6 and numbers.flatten().unique().numel() == numbers.numel()
    correlations = torch.corrcoef(numbers.flatten(1)) - torch.eye(3, dtype=torch.float64)
    assert correlations.abs().max() < 0.03
    assert torch.equal(sketch.gaussian(7, [3, "b"], 100, 200, device, torch.float64), numbers[[2, 1]])
    assert not torch.equal(sketch.gaussian(8, ["a"], 100, 200, device, torch.float64)[0], numbers[0])


# --- leading directions of a stream ---


def stream(d, count=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator) @ torch.diag(
        torch.arange(1, d + 1, dtype=torch.float32) ** -0.7
    )


def test_top_subspace_of_a_wide_covariance_iterates_to_the_eigenvectors():
    x = stream(320).double()
    covariance = x.mT @ x
    assert subspace._iterated(covariance, 3) is not None
    found = linalg.top_subspace(covariance, 3)
    exact = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :3]
    torch.testing.assert_close(
        (found * exact).sum(0).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
    )
    rank_one = torch.outer(x[0], x[0])
    assert linalg.top_subspace(rank_one, 3).shape == (320, 1)
    assert linalg.top_subspace(torch.zeros(320, 320), 3).shape == (320, 0)


def test_top_subspace_converges_where_eigenvalues_lie_close_together():
    values = torch.cat([torch.tensor([1.0, 0.99, 0.98]), torch.linspace(0.8, 0.6, 997)]).double()
    vectors = torch.linalg.qr(torch.randn(1000, 1000, dtype=torch.float64)).Q
    covariance = vectors * values @ vectors.mT
    iterated = subspace._iterated(covariance, 3)
    assert iterated is not None
    torch.testing.assert_close(iterated[0], values[:3], rtol=1e-12, atol=0)
    found = linalg.top_subspace(covariance, 3)
    torch.testing.assert_close(
        (found * vectors[:, :3]).sum(0).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("width", [1, 3, 4, 30, 257])
def test_the_products_of_columns_take_half_the_work_and_lose_nothing(width):
    x = torch.randn(70, width)
    found, exact = subspace._gram_of_columns(x), x.double().mT @ x.double()
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    torch.testing.assert_close(found, found.mT, rtol=1e-5, atol=1e-4)


def test_top_subspace_decomposes_fully_where_iterating_does_not_end():
    flat = torch.eye(320, dtype=torch.float64) + 1e-9 * torch.diag(torch.arange(320, dtype=torch.float64))
    assert subspace._iterated(flat, 3) is None
    found = linalg.top_subspace(flat, 2)
    torch.testing.assert_close(found.abs().argmax(0), torch.tensor([319, 318]))


def test_top_subspace_refuses_what_is_no_covariance():
    with pytest.raises(ValueError, match=r"shape \[3, 4\]"):
        linalg.top_subspace(torch.ones(3, 4), 2)
    with pytest.raises(ValueError, match="non-finite"):
        linalg.top_subspace(torch.full((3, 3), torch.nan), 2)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_input_directions_are_those_of_all_vectors_together(dtype, limit, offset):
    x = (stream(20) + offset).to(dtype)  # with a mean that outweighs all else by up to 1e4
    nothing = linalg.InputDirections(20)
    parts = nothing.including(x[:100].view(4, 25, 20)).including(x[100:]).including(x[:0])
    found, exact = parts.top(3), linalg.top_subspace(x.double().mT @ x.double(), 3)
    assert (found - exact).norm(dim=0).max() <= limit  # each direction by itself
    assert nothing.statistic is None and nothing.top(3).shape == (20, 0)
    with pytest.raises(ValueError, match="width 19, expected 20"):
        nothing.including(x[:, 1:])


def test_a_wide_stream_is_sketched(monkeypatch):
    monkeypatch.setattr(subspace, "WIDE", 64)
    x = stream(400, count=2000)
    directions = linalg.InputDirections(400)
    for part in x.split(333):
        directions = directions.including(part)
    assert directions.statistic.shape == (256, 400)
    exact = linalg.top_subspace(x.double().mT @ x.double(), 3)
    found = directions.top(3)
    torch.testing.assert_close(found.mT @ found, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.svdvals(exact.mT @ found).min() > 1 - 1e-4
    lost = x.double().mT @ x.double() - directions.statistic.mT @ directions.statistic
    assert (
        torch.linalg.eigvalsh(lost).min() > -1e-9
        and torch.linalg.matrix_norm(lost, 2) < x.double().square().sum() / 256
    )
    few = linalg.InputDirections(400).including(x[:2])
    assert few.top(3).shape == (400, 2)


def test_layers_that_share_their_inputs_share_what_is_kept_of_them():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.late, self.out = (torch.nn.Linear(6, 6) for _ in range(4))

        def forward(self, x, everything):
            y = self.q(x) + self.k(x)
            return self.out(y + self.late(x) if everything else y)

    model, x = Model(), torch.randn(3, 4, 6)
    layers = dict(model.named_children())
    with input_directions(layers) as seen, torch.no_grad():
        model(x, everything=False)
        model(x + 1, everything=True)
    assert seen["q"] is seen["k"]
    assert seen["late"] is not seen["q"] and seen["out"] is not seen["q"]
    both, second = torch.cat([x, x + 1]).flatten(0, -2).double(), (x + 1).flatten(0, -2).double()
    torch.testing.assert_close(seen["q"].statistic, both.mT @ both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["late"].statistic, second.mT @ second, rtol=1e-5, atol=1e-5)
    bases = extend({name: torch.zeros(6, 0) for name in layers}, seen, 2)
    assert all(basis.shape == (6, 2) for basis in bases.values())
