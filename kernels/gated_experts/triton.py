"""Triton kernels of the gated sum of low-rank experts, and their launchers.

    gates     z = x̄ wᵀ + β [G, T] and what the gates saw, x̄ [G, d_in]
    active    which experts are left where gates are 0, and the order of tokens sorted by them
    shrink    H = x A_catᵀ [N, T·r] and z ⊙ H
    expand    y = x W₀ᵀ + b + (z ⊙ H) B_cat, in one accumulator; with swapped roles also the gradient of x
    upstream  z ⊙ u with u = dy B_catᵀ, and the row sums of u ⊙ H per expert: the backward of the gates

Tokens are numbered n = 0 … N − 1 and share a gate by `group`: token n has the gate values z[n // group], so
that a group is one token, one sample or the whole batch.  All sums run in fp32, none through atomics: equal
inputs give equal bits.  Where there are too few tiles for the chip, programs share the inner products of a
tile, and a second launch adds up their parts in a fixed order.  Large products of half precision take the
kernels of `mingle.kernels.gated_experts.descriptors`.
"""

from __future__ import annotations

import torch

from mingle.kernels import launches
from mingle.kernels.gated_experts.expand import expand
from mingle.kernels.gated_experts.gates import gates
from mingle.kernels.gated_experts.listed import active
from mingle.kernels.gated_experts.shrink import shrink
from mingle.kernels.gated_experts.upstream import upstream

__all__ = ["active", "expand", "gates", "shrink", "together", "upstream"]


@launches.repeated
def together(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    up: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor,
    mask: torch.Tensor | None,
    group: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gates`, `shrink` and `expand` one after the other, as one call to record and repeat.

    Returns:
        y [N, d_out], H [N, T·r] (no rows without `keep`), z [G, T] and x̄ [G, d_in].
    """
    z, pooled = gates(x, gate_weight, gate_bias, mask, group)
    hidden, gated = shrink(x, A, z, group, None, keep=keep)
    y = expand(x, weight, bias, hidden, gated, up, z, group, None, keep=keep)
    return y, hidden, z, pooled
