"""Experts of a task vector by Eq. 3, one layer or many at once."""

from __future__ import annotations

import pytest
import torch

from mingle import linalg
from mingle.linalg import spectrum
from mingle.methods import experts
from mingle.methods.experts import concatenated, make_experts, project_out_experts
from mingle.nn.low_rank_expert import LowRankExpert


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


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.9, 2), (0.97, 3), (1 - 1e-9, 4), (1.0, 4)])
def test_experts_have_no_more_directions_than_hold_the_energy(energy, rank):
    U, V = (torch.linalg.qr(torch.randn(size, 5))[0] for size in (10, 14))
    delta = U * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]) @ V.T  # 64, 80, 84, 85 of 85
    small = {"small": delta / 1000, "none": torch.zeros(10, 14)}
    found = make_experts({"fc1": delta} | small, dict.fromkeys(["fc1", *small], ()), 4, energy=energy)
    assert [len(found[name].A) for name in ("fc1", "small")] == [rank, rank]
    kept = found["fc1"].delta()
    assert float((kept / delta.norm()).square().sum()) >= min(energy, 1 - 1e-6)
    torch.testing.assert_close(kept, U[:, :rank] * torch.tensor([8.0, 4.0, 2.0, 1.0])[:rank] @ V.T[:rank])


def test_energy_counts_what_projection_leaves():
    U, V = (torch.linalg.qr(torch.randn(size, 5))[0] for size in (10, 14))
    older = LowRankExpert(100 * V.T[:1], U[:, :1])
    delta = U * torch.tensor([50.0, 0.0, 3.0, 2.0, 1.0]) @ V.T
    expert = make_experts({"fc1": delta}, {"fc1": [older]}, 4, energy=0.9)["fc1"]
    torch.testing.assert_close(
        expert.delta(), U[:, 2:4] * torch.tensor([3.0, 2.0]) @ V.T[2:4], atol=1e-4, rtol=0
    )


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
