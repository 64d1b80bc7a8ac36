"""Which tokens share a row of gates: the gates and the mask of a call, as the operators take them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor

from mingle.kernels.dtypes import wide


class Grouping(NamedTuple):
    """How the N tokens of x [..., d_in], in one dimension, come by their gates."""

    group: int  # consecutive tokens that share a row, at least 1
    gates: Tensor | None  # [N / group, T] in the dtype of `wide`; None for linear gates
    mask: Tensor | None  # bool [N]; None where no mean is taken, or over all tokens


def linear(x: Tensor, reduce: str, mask: Tensor | None) -> Grouping:
    """For linear gates of what `reduce` says; mask [..., N] over x [..., N, d_in]."""
    flat = None if mask is None or reduce == "token" else mask.reshape(-1)
    return Grouping(linear_group(x, reduce), None, flat)


def linear_group(x: Tensor, reduce: str) -> int:
    """Consecutive tokens of x that share their linear gates."""
    if reduce == "token" or (reduce == "sample" and x.dim() <= 2):
        return 1
    return max(1, x.shape[-2] if reduce == "sample" else prod(x.shape[:-1]))


def given(x: Tensor, gates: Tensor) -> Grouping:
    """For given gates, `compact` ones."""
    tokens = prod(x.shape[:-1])
    if gates.dim() == 1:
        group = tokens
    elif gates.shape[:-1] == x.shape[:-1]:
        group = 1
    else:
        group = x.shape[-2]
    rows = gates.reshape(-1, gates.shape[-1]).to(wide(x))
    return Grouping(max(1, group), rows if tokens else rows[:0], None)


def compact(gates: Tensor, x: Tensor) -> Tensor:
    """Gates that broadcast against x as [T], [samples..., T] or [samples..., N, T], whichever is shortest."""
    if gates.dim() < x.dim() or gates.shape[:-1] == x.shape[:-1]:
        return gates
    if all(size == 1 for size in gates.shape[:-1]):
        return gates.flatten()
    if gates.shape[-2] == 1:
        return gates.squeeze(-2).expand(*x.shape[:-2], -1)
    return gates.expand(*x.shape[:-1], -1)


def aligned(gates: Tensor, x: Tensor) -> Tensor:
    """`compact` gates, with x's number of dimensions again where they have more than one."""
    return gates if gates.dim() in (1, x.dim()) else gates.unsqueeze(-2)
