"""Experts from dense updates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mingle
from mingle import LowRankExpert

# peft warns about most of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 6, 100])
def test_from_dense_is_the_truncated_svd(rank, dtype):
    delta = torch.randn(6, 9).to(dtype)
    factors = LowRankExpert.from_dense(delta, rank)
    kept = min(rank, 6)
    assert factors.A.shape == (kept, 9) and factors.B.shape == (6, kept)
    assert factors.A.dtype == factors.B.dtype == dtype
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
    torch.testing.assert_close(
        factors.B.double() @ factors.A.double(), best, rtol=0, atol=20 * torch.finfo(dtype).eps
    )


def test_from_dense_in_a_layer():
    base, tuned, x = nn.Linear(8, 6), nn.Linear(8, 6), torch.randn(4, 8)
    tuned.bias = base.bias
    model = nn.Sequential(base)
    mingle.add_adapter(model, {"0": LowRankExpert.from_dense(tuned.weight - base.weight, 6)})
    torch.testing.assert_close(model(x), tuned(x))


@pytest.mark.parametrize(
    ("delta", "rank", "message"),
    [
        (torch.zeros(3, 4, 5), 2, r"delta has shape \[3, 4, 5\]"),
        (torch.zeros(4), 2, r"delta has shape \[4\]"),
        (torch.zeros(3, 4).long(), 2, "torch.int64"),
        (torch.full((3, 4), torch.nan), 2, r"\[3, 4\] has non-finite entries"),
        (torch.zeros(3, 4), 0, "rank=0"),
    ],
)
def test_from_dense_refuses(delta, rank, message):
    with pytest.raises(ValueError, match=message):
        LowRankExpert.from_dense(delta, rank)
