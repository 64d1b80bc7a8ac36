"""Several layers that read one x, as q, k and v do: ``mingle::gated_experts_shared`` and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.ops.common import (
    Operator,
    gate_bias_gradient,
    gate_weight_gradient,
    kernels_of,
    of_groups,
    share_of_a_token,
)
from mingle.ops.operands import SharedOperands, dense
from mingle.ops.side_by_side import stacked


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def _gated_experts_shared(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    mask: Tensor | None,
    group: int,
    frozen_gates: Sequence[int],
    save: bool,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`mingle.ops.gated_experts` for several layers with linear gates.

    Args:
        x: [N, d_in].
        weights, As, Bs, gate_weights, gate_biases: one tensor per layer, as for one layer; all ranks are
            equal, numbers of experts and output widths need not be.
        biases: one tensor per layer, or none at all.
        frozen_gates: per layer, how many of its first gates need no gradient.

    Returns:
        y [N, d_out] per layer; H [N, ΣT·r] (no rows without `save`), z [G, ΣT] and x̄ [G, d_in], as for one
        layer.
    """
    rank, experts = As[0].shape[1], [len(A) for A in As]
    none = x.new_empty(0, sum(experts) * rank)
    if len(x) == 0:
        return (
            [x.new_empty(0, len(weight)) for weight in weights],
            none,
            x.new_empty(0, sum(experts), dtype=wide(x)),
            x.new_empty(0, x.shape[1], dtype=wide(x)),
        )
    mask, biases = dense(mask), [dense(bias) for bias in biases]
    kernels = kernels_of(backend, x, len(weights[0]), sum(experts) * rank)
    z, pooled = kernels.gates(x, stacked(gate_weights), stacked(gate_biases), mask, group)
    hidden, gated = kernels.shrink(x, stacked(As), z, group, None, keep=save)
    ys = []
    for i, (weight, B, span) in enumerate(zip(weights, Bs, _spans(experts), strict=True)):
        bias = biases[i] if biases else None
        columns = slice(span.start * rank, span.stop * rank)
        own = hidden[:, columns], None if gated is None else gated[:, columns]
        ys.append(kernels.expand(x, weight, bias, *own, B.mT, z[:, span], group, None, keep=save))
    return ys, hidden if save else none, z, pooled


gated_experts_shared = torch.library.custom_op(
    "mingle::gated_experts_shared", _gated_experts_shared, mutates_args=()
)


@gated_experts_shared.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], As: Sequence[Tensor],
    Bs: Sequence[Tensor], gate_weights: Sequence[Tensor], gate_biases: Sequence[Tensor], mask: Tensor | None,
    group: int, frozen_gates: Sequence[int], save: bool, backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, (_, rank, width) = x.shape[0], As[0].shape
    experts, groups = sum(A.shape[0] for A in As), tokens // group
    return (
        [x.new_empty(tokens, weight.shape[0]) for weight in weights],
        x.new_empty(tokens if save else 0, experts * rank),
        x.new_empty(groups, experts, dtype=wide(x)),
        x.new_empty(0 if group == 1 and mask is None else groups, width, dtype=wide(x)),
    )


def _gated_experts_shared_backward(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    mask: Tensor | None,
    hidden: Tensor,
    z: Tensor,
    group: int,
    firsts: Sequence[int],
    need_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """dx [N, d_in], summed over the layers (no rows without `need_x`), and dz [G, ΣT].

    dz is 0 for the gates before a layer's first one that needs a gradient.
    """
    rank, width = As[0].shape[1:]
    dz = torch.zeros_like(z)
    if len(dys[0]) == 0:
        return dys[0].new_empty(0, width), dz
    mask, hidden, z = dense(mask), dense(hidden), dense(z)
    kernels = kernels_of(backend, dys[0], width, hidden.shape[1])
    dx: Tensor | None = None
    for dy, weight, A, B, gate_weight, span, first in zip(
        dys, weights, As, Bs, gate_weights, _spans([len(A) for A in As]), firsts, strict=True
    ):
        if first == len(A):
            continue
        experts = slice(span.start + first, span.stop)
        columns = slice(experts.start * rank, experts.stop * rank)
        u, rows = kernels.upstream(dy, B[first:], hidden[:, columns], z[:, experts], group, None, keep=need_x)
        own = of_groups(rows, group)
        dz[:, experts] = own
        if need_x:
            share = share_of_a_token(own, mask, group)
            through_gates = dict(share=share, gate_weight=gate_weight, mask=mask)
            part = kernels.expand(dy, weight.mT, None, u, u, A, z[:, span], group, None, **through_gates)
            dx = part if dx is None else dx.add_(part)
    return dys[0].new_empty(0, width) if dx is None else dx, dz


gated_experts_shared_backward = torch.library.custom_op(
    "mingle::gated_experts_shared_backward", _gated_experts_shared_backward, mutates_args=()
)


@gated_experts_shared_backward.register_fake
def _(
    dys: Sequence[Tensor], weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor],
    gate_weights: Sequence[Tensor], mask: Tensor | None, hidden: Tensor, z: Tensor, group: int,
    firsts: Sequence[int], need_x: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return dys[0].new_empty(dys[0].shape[0] if need_x else 0, As[0].shape[2]), torch.empty_like(z)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    given = SharedOperands(*inputs)
    _, hidden, z, pooled = output
    ctx.save_for_backward(
        given.x, given.mask, hidden, z, pooled, *given.weights, *given.As, *given.Bs, *given.gate_weights
    )
    ctx.group, ctx.frozen_gates, ctx.backend = given.group, given.frozen_gates, given.backend
    ctx.layers, ctx.biases = len(given.weights), len(given.biases)
    ctx.gate_bias_dtype = given.gate_biases[0].dtype


def _gradients(ctx: Any, dys: Sequence[Tensor], *_: Tensor | None) -> tuple[Any, ...]:
    """The gradients of x and of the gates; the layers themselves are frozen."""
    x, mask, hidden, z, pooled, *of_layers = ctx.saved_tensors
    following = iter(of_layers)
    weights, As, Bs, gate_weights = [list(islice(following, ctx.layers)) for _ in range(4)]
    need_x = bool(SharedOperands(*ctx.needs_input_grad).x)
    firsts = [0] * ctx.layers if need_x else ctx.frozen_gates
    dx, dz = gated_experts_shared_backward(
        dys, weights, As, Bs, gate_weights, mask, hidden, z, ctx.group, firsts, need_x, ctx.backend
    )
    seen = pooled if pooled.shape[0] else x
    to_weights, to_biases = [], []
    for gate_weight, span, frozen in zip(
        gate_weights, _spans([A.shape[0] for A in As]), ctx.frozen_gates, strict=True
    ):
        own = dz[:, span.start + frozen : span.stop]
        to_weights.append(gate_weight_gradient(own, frozen, seen, gate_weight.dtype))
        to_biases.append(gate_bias_gradient(own, frozen, ctx.gate_bias_dtype))
    none = [None] * ctx.layers
    gradients = SharedOperands(
        x=dx if need_x else None,
        weights=none,
        biases=[None] * ctx.biases,
        As=none,
        Bs=none,
        gate_weights=to_weights,
        gate_biases=to_biases,
    )
    return tuple(gradients)  # a plain one, whose lists PyTorch knows how to flatten


gated_experts_shared.register_autograd(_gradients, setup_context=_save)

SHARED = Operator(
    gated_experts_shared, gated_experts_shared, _gated_experts_shared, _gated_experts_shared_backward
)
