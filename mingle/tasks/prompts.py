"""Prompts of unequal lengths: where their padding is, and at which positions their tokens are."""

from __future__ import annotations

from torch import Tensor


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [n, S] and what is not padding [n, S], int64, with the padding first, wherever it was."""
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.long().gather(1, order)


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the padding last."""
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def positions(mask: Tensor) -> Tensor:
    """The position of every token in its sample, [n, S], which padding on the left does not move.

    Args:
        mask: [n, S], not 0 for tokens that count.
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)
