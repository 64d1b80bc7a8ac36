"""Experts on a GPU are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from spectra import matrix

from mingle.methods.experts import make_experts
from mingle.nn.low_rank_expert import LowRankExpert

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")

R = 16  # with ℓ = 80, so that 200 columns iterate


@pytest.mark.parametrize("tasks", [0, 3, 12])
@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_experts_are_those_of_the_cpu(tasks, drop_diagonal):
    """After 12 tasks the dense sum is decomposed."""
    shapes = [(240, 200), (240, 200), (180, 420), (420, 180)]
    deltas = {f"layers.{i}": matrix("0.9^k", *shape, R, i) for i, shape in enumerate(shapes)}
    earlier = {
        name: [
            LowRankExpert.from_dense(matrix("0.9^k", *delta.shape, R, 100 * (task + 1) + i), R)
            for task in range(tasks)
        ]
        for i, (name, delta) in enumerate(deltas.items())
    }
    expected = make_experts(deltas, earlier, R, drop_diagonal=drop_diagonal)
    moved = {
        name: [LowRankExpert(A.to(DEVICE), B.to(DEVICE)) for A, B in experts]
        for name, experts in earlier.items()
    }
    found = make_experts(
        {name: delta.to(DEVICE) for name, delta in deltas.items()}, moved, R, drop_diagonal=drop_diagonal
    )
    for name, expert in found.items():
        assert expert.A.is_cuda and expert.B.is_cuda
        torch.testing.assert_close(expert.delta().cpu(), expected[name].delta(), rtol=0, atol=2e-5, msg=name)
