"""The operations of mingle as differentiable functions, whatever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from mingle import ops
from mingle.kernels.gated_experts import reference
from mingle.ops import dispatch, grouping
from mingle.ops.checks import check, check_together
from mingle.ops.operands import Call, LayerTensors

__all__ = ["LayerTensors", "gated_experts", "gated_experts_shared", "relaxed_projection"]


def gated_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    *,
    reduce: str = "sample",
    mask: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
    frozen_gates: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer plus a gated sum of low-rank experts (MINGLE Eqs. 2 and 5).

        y = x W₀ᵀ + b + Σ_i g_i(x) · (x A_iᵀ) B_iᵀ,    g_i(x) = w_i · x̄ + β_i

    Args:
        x: input [..., N, d_in]; the last dimension but one counts tokens.  A two-dimensional x [N, d_in]
            holds N samples of one token.
        weight: W₀ [d_out, d_in].
        bias: b [d_out] or None.
        A: down-projections [T, r, d_in], any strides.
        B: up-projections [T, d_out, r], any strides.
        gate_weight: w [T, d_in]; may be None where `gates` is given.
        gate_bias: β [T]; may be None where `gates` is given.
        reduce: what x̄ is: ``"token"`` each token, ``"sample"`` the mean over the tokens of one sample,
            ``"batch"`` the mean over all.
        mask: bool [..., N], true for valid tokens; the others stay out of the means.  Their outputs are
            computed all the same.  Padding may hold anything; in a call that is differentiated, what is not
            finite there counts as 0.
        gates: gate values from any other router instead of the linear gates: [T], one row per sample
            [..., T], or one per token [..., N, T], with 1 for any dimension that is shared.  Gates that are
            exactly 0 cost next to nothing where whole samples or tiles of tokens share them and no gate or
            expert needs a gradient.
        frozen_gates: how many of the first gates get a gradient of 0, which is cheaper than computing it.
        backend: ``"eager"`` expert by expert (the oracle), ``"grouped"`` a few dense products over
            concatenated experts, ``"triton"`` fused kernels, ``"auto"`` the fastest that can run (see
            `mingle.ops.dispatch`).  Only ``"eager"`` is differentiable twice.

    x, weight, bias, A and B share a dtype: fp32, fp16, bf16 or, except for ``"triton"``, fp64; under autocast
    they are cast to its dtype.  gate_weight and gate_bias may be of any floating dtype, `gates` of any real
    one; gates are computed in fp32 or better.  Every tensor may have any strides.  Sums accumulate in fp32 or
    better; fp32 products are IEEE unless TF32 is allowed in ``torch.backends.cuda.matmul``.  Equal inputs
    give equal bits.

    Returns:
        y [..., N, d_out] in x's dtype.  With T = 0 exactly ``F.linear(x, weight, bias)``.  Gradients of
        gradients and forward-mode differentiation go by ``backend="eager"`` alone; inside the transforms of
        `torch.func` every backend is that one.

    Raises:
        ValueError: shapes that do not fit, an unknown `reduce` or `backend`; the message names the argument.
        TypeError: mixed dtypes outside autocast, or tensors on different devices; the message names both.
        RuntimeError: an explicit backend that cannot run here; the message says why.
    """
    if gates is not None:
        gate_weight = gate_bias = None
    layer = LayerTensors(weight, bias, A, B, gate_weight, gate_bias)
    check(x, layer, reduce, mask, gates, frozen_gates, backend)
    if A.shape[0] == 0:
        return F.linear(x, weight, bias)
    if gates is not None:
        gates = grouping.compact(gates, x)
    if mask is not None and _learns(x, gates, *layer):
        x = reference.finite_padding(x, mask)
    if backend == "eager" or _transformed():
        return _by_the_formula(x, layer, reduce, mask, gates, frozen_gates)
    if not _autocast(x):
        return _by_an_operator(x, layer, reduce, mask, gates, frozen_gates, backend)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        x, layer = x.to(dtype), _cast(layer, dtype)
        return _by_an_operator(x, layer, reduce, mask, gates, frozen_gates, backend)


def _cast(layer: LayerTensors, dtype: torch.dtype) -> LayerTensors:
    """The layer in `dtype`, except for its gates."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer._replace(weight=layer.weight.to(dtype), bias=bias, A=layer.A.to(dtype), B=layer.B.to(dtype))


def _autocast(x: torch.Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which does not know that device


def _transformed() -> bool:
    """Whether `torch.func` looks on, as in `vmap` and `jvp`, for which the operators have no rules."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _learns(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _by_the_formula(
    x: torch.Tensor,
    layer: LayerTensors,
    reduce: str,
    mask: torch.Tensor | None,
    gates: torch.Tensor | None,
    frozen_gates: int,
) -> torch.Tensor:
    weight, bias, A, B, gate_weight, gate_bias = layer
    if gates is None:
        assert gate_weight is not None and gate_bias is not None
        gate_weight, gate_bias = _freeze(gate_weight, frozen_gates, 0), _freeze(gate_bias, frozen_gates, 0)
        values = reference.gate_values(x, gate_weight, gate_bias, reduce, mask)
    else:
        values = grouping.aligned(_freeze(gates, frozen_gates, -1), x)
    return reference.gated_experts(x, weight, bias, A, B, values)


def _by_an_operator(
    x: torch.Tensor,
    layer: LayerTensors,
    reduce: str,
    mask: torch.Tensor | None,
    gates: torch.Tensor | None,
    frozen_gates: int,
    backend: str,
) -> torch.Tensor:
    """All tokens in one dimension, through the operator and the backend that cost least."""
    tokens, (outputs, _) = x.reshape(-1, x.shape[-1]), layer.weight.shape
    group, rows, mask = grouping.linear(x, reduce, mask) if gates is None else grouping.given(x, gates)
    skip = gates is not None and not _learns(gates, layer.A, layer.B)
    backend, fold = dispatch.plan(backend, tokens, group, outputs, layer.A.shape[0] * layer.A.shape[1])
    save = _learns(tokens, rows, *layer)
    call = Call(rows, mask, group, frozen_gates, skip, save, backend)
    y = _folded(tokens, layer, call) if fold else _low_rank(tokens, layer, call)
    return y.view(*x.shape[:-1], outputs)


def _low_rank(x: torch.Tensor, layer: LayerTensors, call: Call) -> torch.Tensor:
    y: torch.Tensor = ops.LOW_RANK(call.save, x, *layer, *call)[0]
    return y


def _folded(x: torch.Tensor, layer: LayerTensors, call: Call) -> torch.Tensor:
    y: torch.Tensor = ops.FOLDED(
        call.save, x, *layer, call.gates, call.mask, call.frozen_gates, call.backend
    )[0]
    return y


def gated_experts_shared(
    x: torch.Tensor,
    layers: Sequence[LayerTensors],
    *,
    reduce: str = "sample",
    mask: torch.Tensor | None = None,
    frozen_gates: Sequence[int] | None = None,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """`gated_experts` for layers that read one x, with one pass over it for all their A and gates.

    Args:
        x: input [..., N, d_in].
        layers: their tensors.  Ranks must be equal, all or none must have a bias, and only x and gates may
            need gradients; otherwise, and where folding pays, the layers are computed one by one.
        frozen_gates: as for `gated_experts`, a number for each layer; none where None.
        reduce, mask, backend: as for `gated_experts`.

    Returns:
        y [..., N, d_out] per layer, equal to what `gated_experts` returns up to rounding.

    Raises:
        As `gated_experts`.
    """
    frozen = [0] * len(layers) if frozen_gates is None else list(frozen_gates)
    for layer, count in zip(layers, frozen, strict=True):
        check(x, layer, reduce, mask, None, count, backend)
    if mask is not None and _learns(x, *chain(*layers)):
        x = reference.finite_padding(x, mask)
    group, _, rows_of_mask = grouping.linear(x, reduce, mask)
    tokens = x.reshape(-1, x.shape[-1])
    plan = None if backend == "eager" or _transformed() else _common_plan(tokens, layers, group, backend)
    if plan is None or _autocast(x) or not _stackable(layers):
        return [
            gated_experts(x, *layer, reduce=reduce, mask=mask, frozen_gates=count, backend=backend)
            for layer, count in zip(layers, frozen, strict=True)
        ]
    gate_weights, gate_biases = [layer.gate_weight for layer in layers], [layer.gate_bias for layer in layers]
    save = _learns(x, *gate_weights, *gate_biases)
    ys = ops.SHARED(
        save,
        tokens,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers if layer.bias is not None],
        [layer.A for layer in layers],
        [layer.B for layer in layers],
        gate_weights,
        gate_biases,
        rows_of_mask,
        group,
        frozen,
        save,
        plan.backend,
    )[0]
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _common_plan(
    tokens: torch.Tensor, layers: Sequence[LayerTensors], group: int, backend: str
) -> dispatch.ExecutionPlan | None:
    """The plan that is the same for all layers; None where there is none, or where folding pays."""
    plans = {
        dispatch.plan(backend, tokens, group, len(layer.weight), layer.A.shape[0] * layer.A.shape[1])
        for layer in layers
    }
    plan = plans.pop() if len(plans) == 1 else None
    return None if plan is None or plan.fold else plan


def _stackable(layers: Sequence[LayerTensors]) -> bool:
    """Whether the operator for shared inputs takes these layers."""
    first = layers[0]
    return all(
        layer.A.shape[0] > 0
        and layer.A.shape[1] == first.A.shape[1]
        and (layer.bias is None) == (first.bias is None)
        and layer.gate_weight is not None
        and first.gate_weight is not None
        and layer.gate_weight.dtype == first.gate_weight.dtype
        and not any(
            factor is not None and factor.requires_grad
            for factor in (layer.weight, layer.bias, layer.A, layer.B)
        )
        for layer in layers
    )


def _freeze(gates: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """The same values, the first `count` along `dim` without a gradient."""
    if count == 0:
        return gates
    frozen, others = gates.tensor_split([count], dim)
    return torch.cat([frozen.detach(), others], dim)


class _RelaxedProjection(torch.autograd.Function):
    """Identity forward; backward takes the basis out of the gradient, each direction as far as its λ says."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, basis: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(basis, lam)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grads
        basis, lam = ctx.saved_tensors
        return gradient - ((gradient @ basis) * lam.to(gradient.dtype)) @ basis.mT, None, None


def relaxed_projection(weight: torch.Tensor, basis: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """`weight` itself, whose gradient G is replaced by G − (G U) diag(λ) Uᵀ (MINGLE Eq. 11).

    Args:
        weight: [n, d].
        basis: orthonormal columns U [d, K] in weight's dtype; K = 0 leaves the gradient as it is.
        lam: λ [K] in [0, 1], of any floating dtype; 1 removes a direction, 0 keeps it.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors of integers, a basis of another dtype than weight, or tensors on different devices.
    """
    check_together({"weight": weight, "basis": basis, "lam": lam})
    if basis.dtype != weight.dtype:
        raise TypeError(f"basis has dtype {basis.dtype}, weight {weight.dtype}")
    if weight.dim() < 1 or basis.dim() != 2 or weight.shape[-1:] + lam.shape != basis.shape:
        raise ValueError(
            f"weight {list(weight.shape)}, basis {list(basis.shape)} and lam {list(lam.shape)}: "
            "expected [n, d], [d, K], [K]"
        )
    result: torch.Tensor = _RelaxedProjection.apply(weight, basis, lam)
    return result
