"""The gated sum of low-rank experts as plain, eager PyTorch: the specification in code, and the oracle.

Nothing here tries to be fast.  Tests and benchmarks import these functions and no other copy of the formulas;
they run on any device and in any floating dtype, float64 included.  Notation: N tokens, T experts of rank r,
layer widths d_in → d_out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

REDUCTIONS = ("token", "sample", "batch")


def pooled_input(x: torch.Tensor, reduce: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the gates see of x [..., N, d_in]; the result broadcasts against x.

    ``token``: x itself.
    ``sample``: the mean over the tokens of each sample, [..., 1, d_in]; the rows of a two-dimensional x are
    samples of one token each, as `torch.nn.Linear` reads them.
    ``batch``: the mean over all tokens, [1, ..., 1, d_in].

    `mask` [..., N] is true for valid tokens; the others stay out of every mean.  A mean over no token is 0.
    """
    if reduce == "token":
        return x
    if x.dim() == 1 or (reduce == "sample" and x.dim() == 2):  # means over one token
        return x if mask is None else torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
    dims = -2 if reduce == "sample" else tuple(range(x.dim() - 1))
    if mask is None:
        tokens = x.shape[-2] if reduce == "sample" else x[..., 0].numel()
        return x.sum(dims, keepdim=True) / max(tokens, 1)
    valid = mask.unsqueeze(-1)
    count = valid.sum(dims, keepdim=True).clamp_min(1)
    # where, not a product: padding may hold anything, NaN included
    return torch.where(valid, x, x.new_zeros(())).sum(dims, keepdim=True) / count.to(x.dtype)


def finite_padding(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x [..., N, d] with 0 for whatever is not finite in tokens outside `mask` [..., N].

    A loss that leaves padding out sends it a gradient of 0, and 0 · NaN would carry it into the sums over
    tokens of a backward pass.
    """
    return torch.where(mask.unsqueeze(-1), x, x.nan_to_num(0.0, 0.0, 0.0))


def gate_values(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor,
    reduce: str,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear gates g_i = w_i · x + β_i (Eq. 5): x [..., N, d_in], w [T, d_in], β [T] → [..., N or 1, T].

    In the wider one of the dtypes of w and β.
    """
    dtype = torch.promote_types(gate_weight.dtype, gate_bias.dtype)
    return F.linear(pooled_input(x, reduce, mask).to(dtype), gate_weight.to(dtype), gate_bias.to(dtype))


def gated_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """y = x W₀ᵀ + b + Σ_i g_i · (x A_iᵀ) B_iᵀ (Eq. 2), expert by expert.

    x [..., d_in], weight [d_out, d_in], bias [d_out], A [T, r, d_in], B [T, d_out, r], gates [..., T]
    broadcasting against x's leading dimensions → y [..., d_out].
    """
    y = F.linear(x, weight, bias)
    for i in range(len(A)):
        y = y + gates[..., i : i + 1].to(y.dtype) * F.linear(F.linear(x, A[i]), B[i])
    return y


def fold(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """W_eff = W₀ + Σ_i g_i B_i A_i for one gate vector [T]; never in place."""
    return weight + torch.einsum("t,tor,tri->oi", gates, B, A)
