"""The operations of mingle as differentiable functions, with one place that chooses how they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mingle import ops
from mingle.kernels.gated_experts import reference
from mingle.kernels.gated_experts.grouped import wide
from mingle.ops import dispatch
from mingle.ops.dispatch import BACKENDS


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
        gates: gate values from any other router instead of the linear gates: [T], one row per sample [...,
            T], or one per token [..., N, T], where any dimension may be 1 that is shared.  Gates that are
            exactly 0 cost next to nothing where whole samples or tiles of tokens share them and no gate or
            expert needs a gradient.
        frozen_gates: the first so many gates get a gradient of 0, which is cheaper than computing it.
        backend: ``"eager"`` expert by expert (the oracle), ``"grouped"`` a few dense products over
            concatenated experts, ``"triton"`` fused kernels, ``"auto"`` the fastest that can run (see
            `mingle.ops.dispatch`).  Only ``"eager"`` is differentiable twice.

    x, weight, bias, A and B share a dtype: fp32, fp16, bf16 or, except for ``"triton"``, fp64; under autocast
        they are cast to its dtype.
    Gates may be of that dtype or fp32, and are computed in fp32 or better.  Sums accumulate in fp32 or
    better; fp32 products are IEEE unless TF32 is allowed in ``torch.backends.cuda.matmul``.  Equal inputs
    give equal bits.

    Returns:
        y [..., N, d_out] in x's dtype.  With T = 0 exactly ``F.linear(x, weight, bias)``.

    Raises:
        ValueError: shapes that do not fit, an unknown `reduce` or `backend`; the message names the argument.
        TypeError: mixed dtypes outside autocast, or tensors on different devices.
        RuntimeError: an explicit backend that cannot run here; the message says why.
    """
    layer = Projection(weight, bias, A, B, gate_weight, gate_bias, frozen_gates)
    _check(x, layer, reduce, mask, gates, backend)
    if A.shape[0] == 0:
        return F.linear(x, weight, bias)
    gates = None if gates is None else _compact_gates(gates, x)
    if mask is not None and _learns(x, gates, *layer[:6]):
        x = reference.finite_padding(x, mask)
    if backend == "eager":
        gate_weight, gate_bias = _freeze(gate_weight, frozen_gates, 0), _freeze(gate_bias, frozen_gates, 0)
        gates = _freeze(gates, frozen_gates, -1)
        if gates is None:
            assert gate_weight is not None and gate_bias is not None
            values = reference.gate_values(x, gate_weight, gate_bias, reduce, mask)
        else:
            values = _align_gates(gates, x)
        return reference.gated_experts(x, weight, bias, A, B, values)
    if not torch.is_autocast_enabled(x.device.type):
        return _matrix_form(x, layer, reduce, mask, gates, backend)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        cast = layer._replace(weight=weight.to(dtype), bias=bias, A=A.to(dtype), B=B.to(dtype))
        return _matrix_form(x.to(dtype), cast, reduce, mask, gates, backend)


class Projection(NamedTuple):
    """The tensors of one layer, as `gated_experts` takes them."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None
    frozen_gates: int = 0


def _matrix_form(
    x: torch.Tensor,
    layer: Projection,
    reduce: str,
    mask: torch.Tensor | None,
    gates: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """All tokens in one dimension, and every `group` of them with one row of gates."""
    weight, _, A, B, *_, frozen_gates = layer
    outputs, (experts, rank, _) = weight.shape[0], A.shape
    tokens = x.reshape(-1, x.shape[-1])
    count = tokens.shape[0]
    operands = layer[:6]
    if gates is None:
        skip = False
        group = _group(x, reduce)
        mask = None if mask is None or reduce == "token" else mask.reshape(-1)
    else:
        skip = not _learns(gates, A, B)
        group = count if gates.dim() == 1 else 1 if gates.shape[:-1] == x.shape[:-1] else x.shape[-2]
        mask, operands = None, (*layer[:4], None, None)
        gates = gates.reshape(-1, experts).to(wide(x))
        gates = gates if count else gates[:0]
    group = max(group, 1)
    backend, fold = dispatch.plan(backend, tokens, group, outputs, experts * rank)
    save = _learns(tokens, gates, *operands)
    if fold:
        y = ops.FOLDED(save, tokens, *operands, gates, mask, frozen_gates, backend)[0]
    else:
        y = ops.LOW_RANK(save, tokens, *operands, gates, mask, group, frozen_gates, skip, save, backend)[0]
    return y.view(*x.shape[:-1], outputs)


def _learns(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def gated_experts_shared(
    x: torch.Tensor,
    layers: Sequence[Projection],
    *,
    reduce: str = "sample",
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> list[torch.Tensor]:
    """`gated_experts` for several layers that read the same x, with one pass over x for all their A and
    gates.

    Args:
        x: input [..., N, d_in].
        layers: their tensors.  Ranks must be equal, all or none must have a bias, and only x and gates may
            need gradients; otherwise, and where folding pays, the layers are computed one by one.
        reduce, mask, backend: as for `gated_experts`.

    Returns:
        y [..., N, d_out] per layer, equal to what `gated_experts` returns up to rounding.

    Raises:
        As `gated_experts`.
    """
    for layer in layers:
        _check(x, layer, reduce, mask, None, backend)
    if mask is not None and _learns(x, *(tensor for layer in layers for tensor in layer[:6])):
        x = reference.finite_padding(x, mask)
    tokens = x.reshape(-1, x.shape[-1])
    group = _group(x, reduce)
    plans = {
        dispatch.plan(backend, tokens, group, len(layer.weight), layer.A.shape[0] * layer.A.shape[1])
        if backend != "eager"
        else None
        for layer in layers
    }
    plan = plans.pop() if len(plans) == 1 else None
    if plan is None or plan.fold or torch.is_autocast_enabled(x.device.type) or not _stackable(layers):
        return [
            gated_experts(
                x, *layer[:6], reduce=reduce, mask=mask, frozen_gates=layer.frozen_gates, backend=backend
            )
            for layer in layers
        ]
    weights, biases, As, Bs, gate_weights, gate_biases, frozen = map(list, zip(*layers, strict=True))
    save = _learns(x, *gate_weights, *gate_biases)
    biases = [bias for bias in biases if bias is not None]
    mask = None if mask is None or reduce == "token" else mask.reshape(-1)
    ys = ops.SHARED(
        save,
        tokens,
        weights,
        biases,
        As,
        Bs,
        gate_weights,
        gate_biases,
        mask,
        group,
        frozen,
        save,
        plan.backend,
    )[0]
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


def _stackable(layers: Sequence[Projection]) -> bool:
    first = layers[0]
    return all(
        layer.A.shape[0] > 0
        and layer.A.shape[1] == first.A.shape[1]
        and (layer.bias is None) == (first.bias is None)
        and layer.gate_weight is not None
        and first.gate_weight is not None
        and layer.gate_weight.dtype == first.gate_weight.dtype
        and not any(tensor is not None and tensor.requires_grad for tensor in layer[:4])
        for layer in layers
    )


def _group(x: torch.Tensor, reduce: str) -> int:
    """Consecutive tokens that share their linear gates."""
    if reduce == "token" or (reduce == "sample" and x.dim() <= 2):
        return 1
    return max(1, x.shape[-2] if reduce == "sample" else x[..., 0].numel())


def _freeze(gates: torch.Tensor | None, count: int, dim: int) -> torch.Tensor | None:
    """The same values, the first `count` along `dim` without a gradient."""
    if gates is None or count == 0:
        return gates
    return torch.cat(
        [gates.narrow(dim, 0, count).detach(), gates.narrow(dim, count, gates.shape[dim] - count)], dim
    )


def _compact_gates(gates: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gates that broadcast against x in the form that says what shares them: [T], [samples..., T] or
    [samples..., N, T].
    """
    if gates.dim() < x.dim() or gates.shape[:-1] == x.shape[:-1]:
        return gates
    if all(size == 1 for size in gates.shape[:-1]):
        return gates.flatten()
    if gates.shape[-2] == 1:
        return gates.squeeze(-2).expand(*x.shape[:-2], -1)
    return gates.expand(*x.shape[:-1], -1)


def _align_gates(gates: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gates [T], [samples..., T] or [samples..., N, T] → the same values with x's number of dimensions."""
    if gates.dim() == 1 or gates.dim() == x.dim():
        return gates
    return gates.unsqueeze(-2)


def _check(
    x: torch.Tensor,
    layer: Projection,
    reduce: str,
    mask: torch.Tensor | None,
    gates: torch.Tensor | None,
    backend: str,
) -> None:
    weight, bias, A, B, gate_weight, gate_bias, frozen_gates = layer
    if reduce not in reference.REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: expected one of {', '.join(reference.REDUCTIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if weight.dim() != 2 or A.dim() != 3 or B.dim() != 3 or x.dim() < 1:
        raise ValueError(
            f"expected x [..., d_in], weight [d_out, d_in], A [T, r, d_in] and B [T, d_out, r], "
            f"got x {list(x.shape)}, weight {list(weight.shape)}, A {list(A.shape)}, B {list(B.shape)}"
        )
    d_out, d_in = weight.shape
    experts, rank, _ = A.shape
    leading, device = x.shape[:-1], x.device
    if not 0 <= frozen_gates <= experts:
        raise ValueError(f"frozen_gates={frozen_gates}: there are {experts} experts")
    if gates is None:
        if experts and (gate_weight is None or gate_bias is None):
            raise ValueError("gate_weight and gate_bias are needed unless gates is given")
    elif gates.shape[-1] != experts or not (
        gates.shape[:-1] in ((), x.shape[:-2]) or _spans(gates.shape[:-1], leading)
    ):
        raise ValueError(
            f"gates has shape {list(gates.shape)}; for x {list(x.shape)} and {experts} experts expected [{experts}], "
            f"{[*x.shape[:-2], experts]} or {[*leading, experts]}, there with 1 for any dimension that is shared"
        )
    else:
        gate_weight = gate_bias = None
    for name, tensor, shape in (
        ("x", x, (*leading, d_in)),
        ("bias", bias, (d_out,)),
        ("A", A, (experts, rank, d_in)),
        ("B", B, (experts, d_out, rank)),
        ("gate_weight", gate_weight, (experts, d_in)),
        ("gate_bias", gate_bias, (experts,)),
        ("mask", mask, leading),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != device:
            raise TypeError(f"{name} is on {tensor.device}, x on {device}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
    dtype = weight.dtype
    if (
        x.dtype == A.dtype == B.dtype == dtype and (bias is None or bias.dtype == dtype)
    ) or torch.is_autocast_enabled(device.type):
        return
    for name, tensor in (("x", x), ("A", A), ("B", B), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, weight {dtype}: cast one of them, or use autocast"
            )


def _spans(shape: torch.Size, leading: torch.Size) -> bool:
    """Whether `shape` is `leading` with 1 in some places."""
    return len(shape) == len(leading) and all(
        size in (1, whole) for size, whole in zip(shape, leading, strict=True)
    )


class _RelaxedProjection(torch.autograd.Function):
    """Identity forward; backward removes the basis directions from the gradient, each as far as its λ says."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, basis: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(basis, lam)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = grads
        basis, lam = ctx.saved_tensors
        return gradient - ((gradient @ basis) * lam) @ basis.mT, None, None


def relaxed_projection(weight: torch.Tensor, basis: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """`weight` itself, whose gradient G is replaced by G − (G U) diag(λ) Uᵀ (MINGLE Eq. 11).

    Args:
        weight: [n, d].
        basis: orthonormal columns U [d, K] in weight's dtype; K = 0 leaves the gradient as it is.
        lam: λ [K] in [0, 1]; 1 removes a direction, 0 keeps it.

    Raises:
        ValueError: shapes that do not fit.
    """
    if basis.dim() != 2 or weight.shape[-1] != basis.shape[0] or lam.shape != basis.shape[1:]:
        raise ValueError(
            f"weight {list(weight.shape)}, basis {list(basis.shape)} and lam {list(lam.shape)}: expected [n, d], [d, K], [K]"
        )
    result: torch.Tensor = _RelaxedProjection.apply(weight, basis, lam)
    return result
