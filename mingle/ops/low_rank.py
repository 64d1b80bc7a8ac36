"""One low-rank term per expert: ``mingle::gated_experts`` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.kernels.gated_experts import grouped
from mingle.ops.common import (
    GateGradients,
    Operator,
    SavedTensors,
    differentiable,
    gate_gradients,
    keep,
    kernels_of,
    of_groups,
    share_of_a_token,
)
from mingle.ops.operands import LowRankOperands, dense


def _gated_experts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    group: int,
    frozen_gates: int,
    skip: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = x W₀ᵀ + b + Σ_i z_i ⊙ (x A_iᵀ) B_iᵀ, one low-rank term per expert.

    Args:
        x: [N, d_in].
        weight: [d_out, d_in].
        bias: [d_out] or None.
        A: [T, r, d_in], T > 0.
        B: [T, d_out, r].
        gate_weight, gate_bias: linear gates [T, d_in] and [T], or None where `gates` is given.
        gates: given gate values [N / group, T], fp32 (fp64 for fp64).
        mask: bool [N]: tokens that count in their group's mean.
        group: consecutive tokens that share a gate row.
        frozen_gates: how many of the first gates need no gradient.
        skip: pass over gates that are 0; only where neither gates nor experts need gradients.
        save: a backward may follow.
        backend: ``"grouped"`` or ``"triton"``.

    Returns:
        y [N, d_out]; and for the backward H = x A_catᵀ [N, T·r] (no rows with `skip` or without `save`), z
        [G, T], and what the gates saw, x̄ [G, d_in] (no rows for given gates and for gates of single tokens).
    """
    if x.shape[0] == 0:
        return (
            x.new_empty(0, len(weight)),
            x.new_empty(0, A.shape[0] * A.shape[1]),
            x.new_empty(0, len(A), dtype=wide(x)),
            x.new_empty(0, x.shape[1], dtype=wide(x)),
        )
    bias, gate_bias, mask = dense(bias), dense(gate_bias), dense(mask)
    if gates is not None:
        # An operator's output may not be its input.
        gates = gates.clone(memory_format=torch.contiguous_format)
    if skip and gates is not None and _routed(gates, backend):
        y = grouped.routed(x, weight, bias, A, B.mT, gates, group)
        return y, x.new_empty(0, A.shape[0] * A.shape[1]), gates, x.new_empty(0, x.shape[1], dtype=wide(x))
    kernels = kernels_of(backend, x, len(weight), A.shape[0] * A.shape[1])
    if gates is None and kernels is not grouped:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels.together(
            x, weight, bias, A, B.mT, gate_weight, gate_bias, mask, group, save
        )
        return result
    if gates is None:
        z, pooled = kernels.gates(x, gate_weight, gate_bias, mask, group)
    else:
        z, pooled = gates, x.new_empty(0, x.shape[1], dtype=wide(x))
    keep = save and not skip
    active = kernels.active(x, A.shape[0] * A.shape[1], len(weight), z, group) if skip else None
    hidden, gated = kernels.shrink(x, A, z, group, active, keep=keep)
    y = kernels.expand(x, weight, bias, hidden, gated, B.mT, z, group, active, keep=keep)
    return y, hidden if keep else hidden.new_empty(0, hidden.shape[1]), z, pooled


def _routed(z: Tensor, backend: str) -> bool:
    """Whether to go expert by expert over the gates that are not 0.

    On the CPU, where reading them costs nothing, and only where at most half are left.
    """
    return backend == "grouped" and z.device.type == "cpu" and 2 * int(z.count_nonzero()) <= z.numel()


gated_experts = torch.library.custom_op("mingle::gated_experts", _gated_experts, mutates_args=())


@gated_experts.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
    gate_weight: Tensor | None, gate_bias: Tensor | None, gates: Tensor | None, mask: Tensor | None,
    group: int, frozen_gates: int, skip: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, (experts, rank, width) = x.shape[0], A.shape
    groups = tokens // group
    pooled = 0 if gates is not None or (group == 1 and mask is None) else groups
    return (
        x.new_empty(tokens, weight.shape[0]),
        x.new_empty(tokens if save and not skip else 0, experts * rank),
        x.new_empty(groups, experts, dtype=wide(x)),
        x.new_empty(pooled, width, dtype=wide(x)),
    )


def _gated_experts_backward(
    dy: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    gate_weight: Tensor | None,
    mask: Tensor | None,
    hidden: Tensor,
    z: Tensor,
    group: int,
    first: int,
    need_x: bool,
    need_u: bool,
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `gated_experts` that take a pass over the tokens.

        u = dy B_catᵀ
        dz_i = Σ_{tokens of the group} Σ_{columns of i} u ⊙ H
        dx = dy W₀ + (z ⊙ u) A_cat + dz w (/ tokens in the mean)

    z ⊙ u, the gradient of H, also gives that of A.

    Args:
        first: the first expert whose gate or factors need a gradient; must be 0 with `need_x`.

    Returns:
        dx [N, d_in] (no rows without `need_x`), dz [G, T − first] and z ⊙ u [N, (T − first)·r] (no rows
        without `need_u`).
    """
    experts, rank, width = A.shape
    if len(dy) == 0 or first == experts:
        return (
            dy.new_empty(0, width),
            dy.new_empty(0 if skip else len(dy) // group, experts - first, dtype=wide(dy)),
            dy.new_empty(len(dy) if need_u else 0, (experts - first) * rank),
        )
    mask, hidden, z = dense(mask), dense(hidden), dense(z)
    kernels = kernels_of(backend, dy, width, (experts - first) * rank)
    none = dy.new_empty(0, (experts - first) * rank)
    if skip and _routed(z, backend):
        return grouped.routed(dy, weight.mT, None, B.mT, A, z, group), z.new_empty(0, experts), none
    # where u goes out its rows are tokens
    active = (
        kernels.active(dy, (experts - first) * rank, width, z[:, first:], group, sort=not need_u)
        if skip
        else None
    )
    u, rows = kernels.upstream(
        dy, B[first:], hidden[:, first * rank :], z[:, first:], group, active, keep=need_x or need_u
    )
    dz = z.new_empty(0, experts) if skip else of_groups(rows, group)
    if not need_x:
        return dy.new_empty(0, width), dz, u if need_u else none
    share = None if gate_weight is None else share_of_a_token(dz, mask, group)
    through_gates = dict(share=share, gate_weight=gate_weight, mask=mask)
    dx = kernels.expand(dy, weight.mT, None, u, u, A, z, group, active, **through_gates)
    return dx, dz, u if need_u else none


gated_experts_backward = torch.library.custom_op(
    "mingle::gated_experts_backward", _gated_experts_backward, mutates_args=()
)


@gated_experts_backward.register_fake
def _(
    dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, gate_weight: Tensor | None, mask: Tensor | None,
    hidden: Tensor, z: Tensor, group: int, first: int, need_x: bool, need_u: bool, skip: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, (experts, rank, width) = dy.shape[0], A.shape
    return (
        dy.new_empty(tokens if need_x else 0, width),
        dy.new_empty(0 if skip else tokens // group, experts - first, dtype=wide(dy)),
        dy.new_empty(tokens if need_u else 0, (experts - first) * rank),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    given = LowRankOperands(*inputs)
    keep(ctx, given, output)
    ctx.group, ctx.skip, ctx.backend = given.group, given.skip, given.backend


def _gradients(ctx: Any, dy: Tensor | None, core: Callable[..., tuple[Tensor, ...]]) -> LowRankOperands:
    """The gradients of `gated_experts`; `core` is `gated_experts_backward`, registered or plain."""
    if dy is None:
        return LowRankOperands()
    saved, needs = SavedTensors(*ctx.saved_tensors), LowRankOperands(*ctx.needs_input_grad)
    all_experts = needs.x or needs.A or needs.B
    need_gates = needs.gate_weight or needs.gate_bias or needs.gates
    dx = dA = dB = None
    to_gates = GateGradients()
    if all_experts or need_gates:
        first = 0 if all_experts else ctx.frozen_gates
        tensors = saved.weight, saved.A, saved.B, saved.gate_weight, saved.mask, saved.product, saved.z
        dx, dz, u = core(dy, *tensors, ctx.group, first, needs.x, needs.A, ctx.skip, ctx.backend)
        if need_gates:
            to_gates = gate_gradients(ctx, needs, saved, dz[:, ctx.frozen_gates - first :])
        if needs.A:
            dA = (u.mT @ saved.x).view(saved.A.shape)
        if needs.B:
            dB = (grouped.gate(saved.product, saved.z, ctx.group).mT @ dy).view(saved.B.mT.shape).mT
    return LowRankOperands(
        x=dx if needs.x else None,
        weight=dy.mT @ saved.x if needs.weight else None,
        bias=dy.sum(0) if needs.bias else None,
        A=dA,
        B=dB,
        gate_weight=to_gates.gate_weight,
        gate_bias=to_gates.gate_bias,
        gates=to_gates.gates,
    )


gated_experts.register_autograd(
    lambda ctx, dy, *_: _gradients(ctx, dy, gated_experts_backward), setup_context=_save
)

LOW_RANK = Operator(
    gated_experts,
    differentiable(_gated_experts, _save, partial(_gradients, core=_gated_experts_backward)),
    _gated_experts,
    _gated_experts_backward,
)
