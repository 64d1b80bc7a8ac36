"""The gated sum of experts as a few dense products over concatenated experts: the CPU's default.

For any device and any floating dtype.  The same six operations as the Triton kernels, with the same
arguments: `gates`, `active`, `shrink`, `expand`, `upstream`, `fold`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch

from mingle.kernels import prepack
from mingle.kernels.dtypes import wide
from mingle.kernels.gated_experts.active import Active
from mingle.kernels.gemm import linear, linear_packed

#: Multiplications of a fold from which on its way matters; smaller ones keep the bits of version 0.1.0.
_LARGE = 1 << 26
#: Numbers that fill a vector register are multiplied by one factor at full speed.  Where experts are narrower
#: and H has many numbers, factors are repeated first.
_REGISTER_BYTES, _MANY = 64, 4096
#: Entries that the CPU widens or multiplies at a time on the way to a sum: more would be fresh memory at
#: every call, whose pages take longer than the sum.
_PIECE = 1 << 20


def _in_pieces(reduction: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    """`reduction` of a few rows at a time, where all operands have their rows in the first dimension."""
    first = operands[0]
    if not first.is_cpu or first.numel() <= _PIECE:
        return reduction(*operands)
    rows = max(1, _PIECE // first[0].numel())
    return torch.cat([reduction(*pieces) for pieces in zip(*(x.split(rows) for x in operands), strict=True)])


def group_mean(x: torch.Tensor, mask: torch.Tensor | None, group: int) -> torch.Tensor:
    """The mean over the valid tokens of each group: x [N, K], mask bool [N] → [G, K] in the dtype of `wide`.

    Without a valid token it is 0.
    """
    dtype = wide(x)
    members = x.view(-1, group, x.shape[1])
    if mask is None:
        return members.mean(1) if x.dtype == dtype else _in_pieces(lambda x: x.mean(1, dtype=dtype), members)
    valid = mask.view(-1, group, 1)
    # where, not a product: padding may hold anything, NaN included
    sums = _in_pieces(lambda x, valid: torch.where(valid, x, 0).sum(1, dtype=dtype), members, valid)
    return sums / valid.sum(1).clamp_min(1)


def pooled_gates(
    x: torch.Tensor, gate_weight: torch.Tensor, gate_bias: torch.Tensor, mask: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = x̄ wᵀ + β [G, T] and x̄ [G, K], the `group_mean`, both in the dtype of `wide`."""
    pooled = group_mean(x, mask, group)
    if not gate_weight.dtype == gate_bias.dtype == pooled.dtype:
        gate_weight, gate_bias = gate_weight.to(pooled.dtype), gate_bias.to(pooled.dtype)
    return torch.addmm(gate_bias, pooled, gate_weight.mT), pooled


def gates(
    x: torch.Tensor, gate_weight: torch.Tensor, gate_bias: torch.Tensor, mask: torch.Tensor | None, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mingle.kernels.gated_experts.gates.gates`; gate values and means are fp64 where x is."""
    if group > 1 or mask is not None:
        return pooled_gates(x, gate_weight, gate_bias, mask, group)
    dtype = wide(x)
    if gate_weight.dtype == x.dtype:
        products = torch.nn.functional.linear(x, gate_weight)
    else:
        factors = gate_weight.to(dtype).mT
        products = _in_pieces(lambda x: x.to(dtype) @ factors, x)
    return products.to(dtype) + gate_bias.to(dtype), x.new_empty(0, x.shape[1], dtype=dtype)


def active(
    x: torch.Tensor, columns: int, outputs: int, z: torch.Tensor, group: int, *, sort: bool = True
) -> Active:
    """See `mingle.kernels.gated_experts.listed.active`; these products pass over nothing and list nothing."""
    return Active(z.new_empty(0, z.shape[1] + 1, dtype=torch.int32), None, 0)


def shrink(
    x: torch.Tensor, A: torch.Tensor, z: torch.Tensor, group: int, active: Active | None, *, keep: bool = True
) -> tuple[torch.Tensor, None]:
    """See `mingle.kernels.gated_experts.shrink.shrink`; z ⊙ H is left to `expand`, perhaps in place."""
    packed = prepack.find("shrink", A, x=x)
    return linear(x, A.flatten(0, 1)) if packed is None else linear_packed(x, packed), None


def gate(hidden: torch.Tensor, z: torch.Tensor, group: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """z ⊙ H [N, T·r] in H's dtype, for z [G, T] with N = G · group.

    Written to `out` where that is given; it may be H itself.
    """
    (groups, experts), columns = z.shape, hidden.shape[1]
    rank, factors = columns // experts, z.to(hidden.dtype)
    if rank * hidden.element_size() < _REGISTER_BYTES and hidden.numel() >= _MANY:
        shape: tuple[int, ...] = groups, group, columns
        factors = factors.unsqueeze(2).expand(groups, experts, rank).reshape(groups, 1, columns)
    else:
        shape, factors = (groups, group, experts, rank), factors.view(groups, 1, experts, 1)
    if out is None:
        return torch.mul(hidden.view(shape), factors).view(hidden.shape)
    if out is hidden:
        hidden.view(shape).mul_(factors)
    else:
        torch.mul(hidden.view(shape), factors, out=out.view(shape))
    return out


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    gated: torch.Tensor | None,
    up: torch.Tensor,
    z: torch.Tensor,
    group: int,
    active: Active | None,
    *,
    keep: bool = True,
    share: torch.Tensor | None = None,
    gate_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mingle.kernels.gated_experts.expand.expand`.

    Where `gated` is None it is z ⊙ `hidden`, written to where H was unless `keep` says that H is needed.
    """
    packed = None if gated is not None else prepack.find("joined", weight, up, x=x)
    if packed is not None:
        joined = x.new_empty(len(x), x.shape[1] + hidden.shape[1])  # [x | z ⊙ H]
        joined[:, : x.shape[1]] = x
        gate(hidden, z, group, out=joined[:, x.shape[1] :])
        return linear_packed(joined, packed, bias)
    base = linear(x, weight, bias)
    if gated is None:
        gated = gate(hidden, z, group, out=None if keep else hidden)
    y = linear(gated, up.flatten(0, 1).mT, onto=base)
    if share is not None:
        assert gate_weight is not None
        spread = (share.to(gate_weight.dtype) @ gate_weight).unsqueeze(1).to(y.dtype)  # [G, 1, O]
        if mask is not None:
            spread = torch.where(mask.view(-1, group, 1), spread, 0)
        y.view(-1, group, y.shape[1]).add_(spread)
    return y


def upstream(
    dy: torch.Tensor,
    B: torch.Tensor,
    hidden: torch.Tensor,
    z: torch.Tensor,
    group: int,
    active: Active | None,
    *,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `mingle.kernels.gated_experts.upstream.upstream`."""
    u = linear(dy, B.mT.flatten(0, 1))
    sums = z.new_empty(0, len(B))
    if active is None:
        experts = -1, len(B), B.shape[2]
        sums = _in_pieces(lambda u, hidden: (u.to(wide(u)) * hidden).view(experts).sum(-1), u, hidden)
    return gate(u, z, group, out=u) if keep else u.new_empty(0, u.shape[1]), sums


def fold(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """See `mingle.kernels.gated_experts.fold.fold`."""
    gates, rows, (_, outputs, _) = gates.to(B.dtype), prepack.find("rows", B.mT), B.shape
    if rows is None and weight.is_cpu and outputs >= A.shape[2] and outputs * A.numel() >= _LARGE:
        # the smaller factor is gated, and W₀ added in the product
        return torch.addmm(weight, B.mT.flatten(0, 1).mT, (A * gates.view(-1, 1, 1)).flatten(0, 1))
    if rows is None:
        gated = (B * gates.view(-1, 1, 1)).mT.flatten(0, 1).mT
    else:
        gated = rows * gates.repeat_interleave(B.shape[2])
    return linear(gated, A.flatten(0, 1).mT).add_(weight)  # [O, T·r] @ [T·r, K]


def _one_each(pairs: list[list[int]], groups: int) -> bool:
    """Whether every group has one expert, and few share theirs.

    Otherwise larger products expert by expert are faster.
    """
    experts, rows = {expert for expert, _ in pairs}, {row for _, row in pairs}
    return len(pairs) == len(rows) == groups and 2 * len(experts) > groups


def routed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    z: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """x Wᵀ + b + Σ_i z_i ⊙ (x down_iᵀ) up_i at the cost of the gates that are not 0.

    For sparse gates of another router, on the CPU: it reads the gates on the host.

    x [N, K], weight [O, K], down [T, r, K], up [T, r, O], z [G, T] → [N, O].
    """
    y = linear(x, weight, bias)
    members, outputs = x.unflatten(0, (-1, group)), y.view(-1, group, y.shape[1])
    pairs = z.mT.nonzero().tolist()  # (expert, group), sorted by expert
    if _one_each(pairs, len(z)) and group >= 16:
        # as many products as groups in one call; for single tokens the gathered factors would outweigh x
        experts = z.ne(0).int().argmax(1)
        hidden = torch.bmm(members, down[experts].mT)
        hidden.mul_(z.gather(1, experts[:, None])[:, :, None].to(hidden.dtype))
        outputs.baddbmm_(hidden, up[experts])
        return y
    for expert, rows in groupby(pairs, key=itemgetter(0)):
        chosen = [row for _, row in rows]
        first, count = chosen[0], len(chosen)
        together = chosen[-1] - first + 1 == count  # samples sorted by expert need no gathering
        index: Any = slice(first, first + count) if together else torch.tensor(chosen)
        hidden = linear(members[index].flatten(0, 1), down[expert])
        hidden.view(count, group, -1).mul_(z[index, expert, None, None].to(hidden.dtype))
        if together:
            outputs[index].flatten(0, 1).addmm_(hidden, up[expert])
        else:
            outputs.index_add_(0, index, linear(hidden, up[expert].mT).view(count, group, -1))
    return y
