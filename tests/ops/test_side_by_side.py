"""Tensors side by side in memory: found where they lie so, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mingle.ops.side_by_side import lay, movable, stacked, together


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 3, 8).to(dtype)) for rows in (2, 1, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_laid_side_by_side_is_not_copied(dtype):
    parts = parameters(dtype)
    expected = torch.cat(parts)
    whole = lay(parts)
    assert together(parts) is whole and stacked(parts) is whole and torch.equal(whole, expected)
    assert torch.equal(torch.cat(parts), expected)
    first_two = together(parts[:2])
    assert first_two is not None and first_two.data_ptr() == whole.data_ptr()
    assert torch.equal(first_two, expected[:3])
    with torch.no_grad():
        parts[1].zero_()
    assert not whole[2].any()


def test_every_part_has_a_storage_of_its_own():
    parts = parameters()
    whole = lay(parts)
    assert whole.is_contiguous()
    for part in parts:
        storage = part.untyped_storage()
        assert (storage.data_ptr(), storage.nbytes()) == (part.data_ptr(), part.nbytes)


def test_only_plain_parameters_of_a_kind_are_moved():
    parts = parameters()
    assert movable(parts)
    assert not movable([*parts, torch.randn(1, 3, 8)])
    assert not movable([*parts, *parameters(torch.float64)])
    assert not movable([nn.Parameter(torch.empty(2, 3, 8, device="meta"))])


def _apart(parts):
    return parts[0], parts[2]


def _backwards(parts):
    return parts[1], parts[0]


def _moved(parts):
    parts[1].data = parts[1].data.clone()
    return parts


def _other_shapes(parts):
    parts[1].data = parts[1].data.view(1, 8, 3)
    return parts


def _strided(parts):
    parts[0].data = parts[0].data.mT
    return parts


@pytest.mark.parametrize("change", [_apart, _backwards, _moved, _other_shapes, _strided])
def test_other_tensors_are_copied(change):
    parts = parameters()
    whole = lay(parts)
    changed = change(parts)
    assert together(changed) is None
    if change is not _other_shapes and change is not _strided:
        assert torch.equal(stacked(changed), torch.cat(list(changed)))
    assert whole.shape == (6, 3, 8)
