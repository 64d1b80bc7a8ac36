"""The registered operators ``torch.ops.mingle.*``: what `torch.compile`, autograd and CUDA graphs see of the kernels.

Operators take matrices: the N tokens of all samples in one dimension, and `group`, the number of consecutive tokens that share a gate row
(1 token, one sample, or all).  They are composed here, once for every backend, from the four operations that a backend offers: `shrink`,
`expand`, `upstream` and `fold`.  `mingle.functional` is the public face.

Each operator is a plain function, registered for tracing and wrapped in an autograd function for eager calls, which the dispatcher would
burden with some thirty microseconds each; `run` takes the one that fits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mingle.kernels import gemm, grouped


def _kernels(backend: str) -> ModuleType:
    # Triton is imported at its first use: it may be absent, and it is slow to load.
    return grouped if backend == "grouped" else importlib.import_module("mingle.kernels.gated_experts")


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of gate values and of their gradients: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _share(dz: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """What one valid token receives of its group's gate gradient [G, T]: the derivative of the mean."""
    if mask is None:
        return dz / group
    return dz / mask.view(-1, group).sum(1, keepdim=True).clamp_min(1)


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
        frozen_gates: the first so many gates need no gradient.
        skip: pass over gates that are 0; only where neither gates nor experts need gradients.
        save: a backward may follow.
        backend: ``"grouped"`` or ``"triton"``.

    Returns:
        y [N, d_out]; and for the backward H = x A_catᵀ [N, T·r] (no rows with `skip` or without `save`), z [G, T], and what the gates
        saw, x̄ [G, d_in] (no rows for given gates and for gates of single tokens).
    """
    if len(x) == 0:
        wide = _wide(x)
        return (
            x.new_empty(0, len(weight)),
            x.new_empty(0, A.shape[0] * A.shape[1]),
            x.new_empty(0, len(A), dtype=wide),
            x.new_empty(0, x.shape[1], dtype=wide),
        )
    if gates is not None:
        gates = gates.clone(memory_format=torch.contiguous_format)  # an operator's output may not be its input
    none = x.new_empty(0, A.shape[0] * A.shape[1])
    if skip and _routed_here(x, backend):
        assert gates is not None
        y = grouped.routed(x, weight, bias, A, B.mT, gates, group)
        return y, none, gates, x.new_empty(0, x.shape[1], dtype=_wide(x))
    kernels = _kernels(backend)
    hidden, z, pooled = kernels.shrink(x, A, gate_weight, gate_bias, gates, mask, group, skip)
    y = kernels.expand(x, weight, bias, hidden, B.mT, z, group, skip, keep=save)
    return y, hidden if save and not skip else none, z, pooled


def _routed_here(x: Tensor, backend: str) -> bool:
    return backend == "grouped" and x.device.type == "cpu"


gated_experts = torch.library.custom_op("mingle::gated_experts", _gated_experts, mutates_args=())


@gated_experts.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None,
    gates: Tensor | None, mask: Tensor | None, group: int, frozen_gates: int, skip: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, (experts, rank, width) = x.shape[0], A.shape
    groups = tokens // group
    pooled = 0 if gates is not None or (group == 1 and mask is None) else groups
    return (
        x.new_empty(tokens, weight.shape[0]),
        x.new_empty(tokens if save and not skip else 0, experts * rank),
        x.new_empty(groups, experts, dtype=_wide(x)),
        x.new_empty(pooled, width, dtype=_wide(x)),
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
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `gated_experts` that take a pass over the tokens.

        u = dy B_catᵀ,  dz_i = Σ_{tokens of the group} Σ_{columns of i} u ⊙ H,  dx = dy W₀ + (z ⊙ u) A_cat + dz w (/ tokens in the mean)

    Args:
        first: the first expert whose gate or factors need a gradient; only with `need_x` are the others computed too.

    Returns:
        dx [N, d_in] (no rows without `need_x`), dz [G, T − first] and u [N, (T − first)·r]; with `need_x` `first` must be 0.
    """
    wide, (experts, rank, width) = _wide(dy), A.shape
    if len(dy) == 0:
        return (
            dy.new_empty(0, width),
            dy.new_empty(0, experts - first, dtype=wide),
            dy.new_empty(0, (experts - first) * rank),
        )
    kernels = _kernels(backend)
    if skip and _routed_here(dy, backend):
        return grouped.routed(dy, weight.mT, None, B.mT, A, z, group), z.new_empty(0, experts), dy.new_empty(0, experts * rank)
    u, rows = kernels.upstream(dy, B[first:], hidden[:, first * rank :], z, group, skip)
    dz = z.new_empty(0, experts) if skip else rows.view(-1, group, experts - first).sum(1)
    if not need_x:
        return dy.new_empty(0, width), dz, u
    share = None if gate_weight is None else _share(dz, mask, group)
    dx = kernels.expand(dy, weight.mT, None, u, A, z, group, skip, share=share, gate_weight=gate_weight, mask=mask)
    return dx, dz, u


gated_experts_backward = torch.library.custom_op("mingle::gated_experts_backward", _gated_experts_backward, mutates_args=())


@gated_experts_backward.register_fake
def _(
    dy: Tensor, weight: Tensor, A: Tensor, B: Tensor, gate_weight: Tensor | None, mask: Tensor | None, hidden: Tensor, z: Tensor,
    group: int, first: int, need_x: bool, skip: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, (experts, rank, width) = dy.shape[0], A.shape
    return (
        dy.new_empty(tokens if need_x else 0, width),
        dy.new_empty(0 if skip else tokens // group, experts - first, dtype=_wide(dy)),
        dy.new_empty(0 if skip and _routed_here(dy, backend) else tokens, (experts - first) * rank),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, A, B, gate_weight, gate_bias, gates, mask, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, B, gate_weight, mask, *output[1:])
    ctx.options = options
    ctx.gate_dtypes = [None if gate is None else gate.dtype for gate in (gate_weight, gate_bias, gates)]


def _gradients(ctx: Any, dy: Tensor | None, core: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    """The gradients of `gated_experts` by its arguments; `core` is `gated_experts_backward`, registered or plain."""
    grads: list[Tensor | None] = [None] * 14
    if dy is None:
        return tuple(grads)
    x, weight, A, B, gate_weight, mask, hidden, z, pooled = ctx.saved_tensors
    group, frozen_gates, skip, _, backend = ctx.options
    need_x, need_weight, need_bias, need_A, need_B, *need_gates = ctx.needs_input_grad[:8]
    first = frozen_gates if any(need_gates) and not (need_x or need_A or need_B) else 0
    if need_x or need_A or need_B or any(need_gates):
        dx, dz, u = core(dy, weight, A, B, gate_weight, mask, hidden, z, group, first, need_x, skip, backend)
        grads[0] = dx if need_x else None
        if any(need_gates):
            grads[5:8] = _gate_gradients(ctx, dz[:, frozen_gates - first :], frozen_gates, pooled if pooled.shape[0] else x)
        if need_A:
            grads[3] = (grouped.gate(u, z, group).mT @ x).view(A.shape)
        if need_B:
            grads[4] = (grouped.gate(hidden, z, group).mT @ dy).view(B.mT.shape).mT
    grads[1] = dy.mT @ x if need_weight else None
    grads[2] = dy.sum(0) if need_bias else None
    return tuple(grads)


def _gate_gradients(ctx: Any, dz: Tensor, frozen: int, seen: Tensor) -> list[Tensor | None]:
    """Gradients of gate_weight, gate_bias and gates from dz [G, T − frozen] and what the gates saw [G, d_in]; 0 for the frozen ones."""
    need_weight, need_bias, need_gates = ctx.needs_input_grad[5:8]
    weight, bias, gates = ctx.gate_dtypes
    pad = torch.nn.functional.pad
    return [
        pad((dz.to(seen.dtype).mT @ seen).to(weight), (0, 0, frozen, 0)) if need_weight else None,
        pad(dz.sum(0).to(bias), (frozen, 0)) if need_bias else None,
        pad(dz, (frozen, 0)).to(gates) if need_gates else None,
    ]


class _GatedExperts(torch.autograd.Function):
    forward = staticmethod(_gated_experts)
    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0], _gated_experts_backward)


gated_experts.register_autograd(lambda ctx, dy, *_: _gradients(ctx, dy, gated_experts_backward), setup_context=_save)


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
    """The same sum where all tokens share their gates: one weight W_eff = W₀ + Σ_i z_i B_i A_i, then one product.

    Arguments as for `gated_experts`, with N > 0 and one gate row.  Returns y [N, d_out], W_eff [d_out, d_in], z [1, T] and x̄ [1, d_in]
    (no rows for given gates).
    """
    if gates is None:
        assert gate_weight is not None and gate_bias is not None
        pooled = grouped.group_mean(x, mask, len(x))
        z = torch.addmm(gate_bias.to(pooled.dtype), pooled, gate_weight.to(pooled.dtype).mT)
    else:
        pooled, z = x.new_empty(0, x.shape[1], dtype=_wide(x)), gates.clone()
    kernels = grouped if backend == "grouped" else importlib.import_module("mingle.kernels.fold")
    folded = kernels.fold(weight, A, B, z[0])
    return gemm.linear(x, folded, bias), folded, z, pooled


gated_experts_folded = torch.library.custom_op("mingle::gated_experts_folded", _gated_experts_folded, mutates_args=())


@gated_experts_folded.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, gate_weight: Tensor | None, gate_bias: Tensor | None,
    gates: Tensor | None, mask: Tensor | None, frozen_gates: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape[0], weight.shape[0]),
        weight.new_empty(weight.shape),
        x.new_empty(1, A.shape[0], dtype=_wide(x)),
        x.new_empty(1 if gates is None else 0, x.shape[1], dtype=_wide(x)),
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
    """dx = dy W_eff + dz w / n [N, d_in] (no rows without `need_x`) and dz_i = ⟨dyᵀ x, B_i A_i⟩ [1, T − first].

    dz takes the cheaper of two ways: u = dy B_catᵀ against H = x A_catᵀ token by token, or dyᵀ x once.
    """
    A, B = A[first:], B[first:]
    experts, rank, width = A.shape
    wide, tokens, outputs, columns = _wide(dy), len(dy), B.shape[1], experts * rank
    if tokens * columns * (width + outputs) <= width * outputs * (tokens + columns):
        product = gemm.linear(dy, B.mT.flatten(0, 1)).to(wide) * gemm.linear(x, A.flatten(0, 1))
        dz = product.sum(0).view(experts, rank).sum(1)[None]
    else:
        moved = gemm.linear(gemm.linear(dy.mT, x.mT), A.flatten(0, 1))  # dyᵀ x A_catᵀ [d_out, T·r]
        dz = (moved.to(wide).view(outputs, experts, rank) * B.transpose(0, 1)).sum((0, 2))[None]
    if not need_x:
        return dy.new_empty(0, width), dz
    dx = gemm.linear(dy, folded.mT)
    if gate_weight is not None:
        spread = (_share(dz, mask, tokens).to(gate_weight.dtype) @ gate_weight).to(dx.dtype)  # [1, d_in]
        dx += spread if mask is None else torch.where(mask[:, None], spread, 0)
    return dx, dz


gated_experts_folded_backward = torch.library.custom_op(
    "mingle::gated_experts_folded_backward", _gated_experts_folded_backward, mutates_args=()
)


@gated_experts_folded_backward.register_fake
def _(
    dy: Tensor, x: Tensor, folded: Tensor, A: Tensor, B: Tensor, gate_weight: Tensor | None, mask: Tensor | None, first: int, need_x: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0] if need_x else 0, A.shape[2]), dy.new_empty(1, A.shape[0] - first, dtype=_wide(dy))


def _gradients_folded(ctx: Any, dy: Tensor | None, core: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    """The gradients of `gated_experts_folded` by its arguments; `core` is its backward, registered or plain."""
    grads: list[Tensor | None] = [None] * 11
    if dy is None:
        return tuple(grads)
    x, _, A, B, gate_weight, mask, folded, z, pooled = ctx.saved_tensors
    frozen_gates, _ = ctx.options
    need_x, need_weight, need_bias, need_A, need_B, *need_gates = ctx.needs_input_grad[:8]
    if need_x or any(need_gates):
        first = 0 if need_x else frozen_gates
        dx, dz = core(dy, x, folded, A, B, gate_weight, mask, first, need_x)
        grads[0] = dx if need_x else None
        grads[5:8] = _gate_gradients(ctx, dz[:, frozen_gates - first :], frozen_gates, pooled)
    if need_weight or need_A or need_B:
        whole = dy.mT @ x
        strength = z[0].to(whole.dtype)
        grads[1] = whole if need_weight else None
        grads[3] = torch.einsum("t,tor,oi->tri", strength, B, whole) if need_A else None
        grads[4] = torch.einsum("t,tri,oi->tor", strength, A, whole) if need_B else None
    grads[2] = dy.sum(0) if need_bias else None
    return tuple(grads)


class _GatedExpertsFolded(torch.autograd.Function):
    forward = staticmethod(_gated_experts_folded)
    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients_folded(ctx, grads[0], _gated_experts_folded_backward)


gated_experts_folded.register_autograd(lambda ctx, dy, *_: _gradients_folded(ctx, dy, gated_experts_folded_backward), setup_context=_save)


def run(folded: bool, differentiable: bool, *arguments: Any) -> Tensor:
    """y of `gated_experts`, or of `gated_experts_folded`: through the dispatcher where something traces, else past it."""
    if torch.compiler.is_compiling() or type(arguments[0]) not in (Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        operator: Callable[..., tuple[Tensor, ...]] = gated_experts_folded if folded else gated_experts
    elif differentiable:
        operator = (_GatedExpertsFolded if folded else _GatedExperts).apply
    else:
        operator = _gated_experts_folded if folded else _gated_experts
    return operator(*arguments)[0]
