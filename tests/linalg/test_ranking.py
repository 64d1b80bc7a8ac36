"""The n-th largest of several tensors' magnitudes, against sorting them all."""

from __future__ import annotations

import pytest
import torch

from mingle.linalg import ranking


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "few values", "tiny", "equal"])
def test_every_rank_is_that_of_the_sorted_magnitudes(dtype, kind):
    numbers = {
        "normal": torch.randn(300),
        "few values": torch.randint(-3, 4, (300,)),
        "tiny": torch.randn(300) * 1e-41,  # below the smallest normal fp32
        "equal": torch.full((300,), -0.7),
    }[kind].to(dtype)
    tensors = [numbers[:7], numbers[7:207].reshape(10, 20).mT, numbers[207:]]
    expected = numbers.abs().sort(descending=True).values.tolist()
    for rank in (1, 2, 150, 299, 300):
        assert ranking.nth_largest(tensors, rank) == expected[rank - 1]


def test_tensors_of_two_precisions_are_compared_in_the_wider():
    wide = torch.tensor([1.0, 1 + 2.0**-40], dtype=torch.float64)
    assert ranking.nth_largest([torch.tensor([1.0, -3.0]), wide], 2) == 1 + 2.0**-40


def test_long_tensors_are_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(ranking, "_TOGETHER", 16)
    numbers = torch.randn(100)
    assert ranking.nth_largest([numbers], 40) == numbers.abs().sort(descending=True).values[39]
