"""One weight for all tokens: ``mingle::gated_experts_folded`` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mingle.kernels import gemm
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
    share_of_a_token,
)
from mingle.ops.operands import FoldedOperands


def _gated_experts_folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    frozen_gates: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = x W_effᵀ + b with W_eff = W₀ + Σ_i z_i B_i A_i: the same sum where all tokens share their gates.

    Arguments as for `gated_experts`, with N > 0 and one gate row.  Returns y [N, d_out], W_eff [d_out, d_in],
    z [1, T] and x̄ [1, d_in] (no rows for given gates).
    """
    if gates is None:
        assert gate_weight is not None and gate_bias is not None
        z, pooled = grouped.pooled_gates(x, gate_weight, gate_bias, mask, len(x))
    else:
        pooled = x.new_empty(0, x.shape[1], dtype=wide(x))
        z = gates.clone(memory_format=torch.contiguous_format)
    folded = kernels_of(backend, x, len(weight), A.shape[0] * A.shape[1], "fold").fold(weight, A, B, z[0])
    return gemm.linear(x, folded, bias), folded, z, pooled


gated_experts_folded = torch.library.custom_op(
    "mingle::gated_experts_folded", _gated_experts_folded, mutates_args=()
)


@gated_experts_folded.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
    gate_weight: Tensor | None, gate_bias: Tensor | None, gates: Tensor | None, mask: Tensor | None,
    frozen_gates: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape[0], weight.shape[0]),
        weight.new_empty(weight.shape),
        x.new_empty(1, A.shape[0], dtype=wide(x)),
        x.new_empty(1 if gates is None else 0, x.shape[1], dtype=wide(x)),
    )


def _gated_experts_folded_backward(
    dy: Tensor,
    x: Tensor,
    folded: Tensor,
    A: Tensor,
    B: Tensor,
    gate_weight: Tensor | None,
    mask: Tensor | None,
    first: int,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy W_eff + dz w / n [N, d_in] and dz_i = ⟨dyᵀ x, B_i A_i⟩ [1, T − first].

    dx has no rows without `need_x`.  dz takes the cheaper of two ways: u = dy B_catᵀ against H = x A_catᵀ
    token by token, or dyᵀ x once.
    """
    A, B = A[first:], B[first:]
    experts, rank, width = A.shape
    tokens, outputs, columns = len(dy), B.shape[1], experts * rank
    if tokens * columns * (width + outputs) <= width * outputs * (tokens + columns):
        product = gemm.linear(dy, B.mT.flatten(0, 1)).to(wide(dy)) * gemm.linear(x, A.flatten(0, 1))
        dz = product.sum(0).view(experts, rank).sum(1)[None]
    else:
        # dyᵀ x [d_out, d_in]; the first factor is laid out anew, so the narrower one comes first
        across = gemm.linear(dy.mT, x.mT) if outputs <= width else gemm.linear(x.mT, dy.mT).mT
        moved = gemm.linear(A.flatten(0, 1), across)  # A_cat xᵀ dy [T·r, d_out]
        dz = (moved.to(wide(dy)).view(experts, rank, outputs) * B.mT).sum((1, 2))[None]
    if not need_x:
        return dy.new_empty(0, width), dz
    dx = gemm.linear(dy, folded.mT)
    if gate_weight is not None:
        share = share_of_a_token(dz, mask, tokens).to(gate_weight.dtype)
        spread = (share @ gate_weight).to(dx.dtype)  # [1, d_in]
        dx += spread if mask is None else torch.where(mask[:, None], spread, 0)
    return dx, dz


gated_experts_folded_backward = torch.library.custom_op(
    "mingle::gated_experts_folded_backward", _gated_experts_folded_backward, mutates_args=()
)


@gated_experts_folded_backward.register_fake
def _(
    dy: Tensor, x: Tensor, folded: Tensor, A: Tensor, B: Tensor, gate_weight: Tensor | None,
    mask: Tensor | None, first: int, need_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = dy.new_empty(dy.shape[0] if need_x else 0, A.shape[2])
    return dx, dy.new_empty(1, A.shape[0] - first, dtype=wide(dy))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    keep(ctx, FoldedOperands(*inputs), output)


def _gradients(ctx: Any, dy: Tensor | None, core: Callable[..., tuple[Tensor, ...]]) -> FoldedOperands:
    """The gradients of `gated_experts_folded`; `core` is its backward, registered or plain."""
    if dy is None:
        return FoldedOperands()
    saved, needs = SavedTensors(*ctx.saved_tensors), FoldedOperands(*ctx.needs_input_grad)
    dx = dW = dA = dB = None
    to_gates = GateGradients()
    if needs.x or needs.gate_weight or needs.gate_bias or needs.gates:
        first = 0 if needs.x else ctx.frozen_gates
        tensors = saved.x, saved.product, saved.A, saved.B, saved.gate_weight, saved.mask
        dx, dz = core(dy, *tensors, first, needs.x)
        to_gates = gate_gradients(ctx, needs, saved, dz[:, ctx.frozen_gates - first :])
    if needs.weight or needs.A or needs.B:
        dW = dy.mT @ saved.x
        strength = saved.z[0].to(dW.dtype)
        dA = torch.einsum("t,tor,oi->tri", strength, saved.B, dW) if needs.A else None
        dB = torch.einsum("t,tri,oi->tor", strength, saved.A, dW) if needs.B else None
    return FoldedOperands(
        x=dx if needs.x else None,
        weight=dW if needs.weight else None,
        bias=dy.sum(0) if needs.bias else None,
        A=dA,
        B=dB,
        gate_weight=to_gates.gate_weight,
        gate_bias=to_gates.gate_bias,
        gates=to_gates.gates,
    )


gated_experts_folded.register_autograd(
    lambda ctx, dy, *_: _gradients(ctx, dy, gated_experts_folded_backward), setup_context=_save
)

FOLDED = Operator(
    gated_experts_folded,
    differentiable(_gated_experts_folded, _save, partial(_gradients, core=_gated_experts_folded_backward)),
    _gated_experts_folded,
    _gated_experts_folded_backward,
)
