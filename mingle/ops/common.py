"""What the operators share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mingle.kernels.gated_experts import grouped
from mingle.ops import dispatch
from mingle.ops.operands import FoldedOperands, LowRankOperands


class Operator(NamedTuple):
    """One operator in three forms, and its backward."""

    registered: Callable[..., Any]  # what tracers see
    differentiable: Callable[..., Any]  # eager, with a backward
    plain: Callable[..., Any]  # eager, without
    backward: Callable[..., Any]  # eager, of gradients alone

    def __call__(self, save: bool, *arguments: Any) -> Any:
        """Apply the form that fits; `save`: a backward may follow.  The first argument is a tensor."""
        if (
            torch.compiler.is_compiling()
            or type(arguments[0]) not in (Tensor, torch.nn.Parameter)
            or torch._C._len_torch_dispatch_stack()
        ):
            return self.registered(*arguments)
        return (self.differentiable if save else self.plain)(*arguments)


def kernels_of(backend: str, x: Tensor, outputs: int, columns: int, fused: str = "triton") -> ModuleType:
    """The module that computes: `grouped`, or the one with the Triton kernels, ``triton`` or ``fold``.

    With ``"auto"`` the cheapest for x [N, d_in], d_out = `outputs` and T·r = `columns`.
    """
    if backend == "auto":
        backend = dispatch.cheapest(x, outputs, columns)
    if backend == "grouped":
        return grouped
    name = f"mingle.kernels.gated_experts.{fused}"
    # Triton is imported at its first use: it may be absent, and it is slow to load.
    return sys.modules.get(name) or importlib.import_module(name)


def of_groups(rows: Tensor, group: int) -> Tensor:
    """The gradients of groups' gates [G, T], from what each of their tokens adds [N, T]."""
    return rows if group == 1 else rows.view(-1, group, rows.shape[1]).sum(1)


def share_of_a_token(dz: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """What one valid token receives of its group's gate gradient [G, T]: the derivative of the mean."""
    if mask is None and group == 1:
        return dz
    if mask is None:
        return dz / group
    return dz / mask.view(-1, group).sum(1, keepdim=True).clamp_min(1)


def differentiable(
    plain: Callable[..., Any], save: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """`plain` with a backward, past the dispatcher; it cannot be differentiated twice.

    Args:
        save: takes the context, the arguments and what `plain` returned.
        gradients: takes the context and dy, and returns one gradient for each argument.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # Without a `setup_context`, for which PyTorch binds the arguments to a signature at every call,
            # 45 µs each time.
            output = plain(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, grads[0])

    return Eager.apply


class SavedTensors(NamedTuple):
    """The tensors that a forward keeps for its backward: those of its arguments, then its own results."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    gate_weight: Tensor | None
    mask: Tensor | None
    product: Tensor  # H [N, T·r], or W_eff [d_out, d_in] where the experts were folded
    z: Tensor  # [G, T]
    pooled: Tensor  # x̄ [G, d_in], or no rows


class GateGradients(NamedTuple):
    """The gradients of the arguments that gates come from."""

    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    gates: Tensor | None = None


def keep(
    ctx: Any, given: LowRankOperands | FoldedOperands, output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Keep on `ctx` what the backward needs of the operands and of the results y, product, z and x̄."""
    _, product, z, pooled = output
    ctx.mark_non_differentiable(product, z, pooled)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *SavedTensors(
            given.x, given.weight, given.A, given.B, given.gate_weight, given.mask, product, z, pooled
        )
    )
    ctx.frozen_gates = given.frozen_gates
    ctx.gate_bias_dtype = None if given.gate_bias is None else given.gate_bias.dtype


def gate_gradients(
    ctx: Any, needs: LowRankOperands | FoldedOperands, saved: SavedTensors, dz: Tensor
) -> GateGradients:
    """What an operator needs of the gradients of its gates, from dz [G, T − frozen]; 0 for frozen gates."""
    frozen = ctx.frozen_gates
    weight = bias = gates = None
    if needs.gate_weight:
        assert saved.gate_weight is not None
        seen = saved.pooled if saved.pooled.shape[0] else saved.x
        weight = gate_weight_gradient(dz, frozen, seen, saved.gate_weight.dtype)
    if needs.gate_bias:
        bias = gate_bias_gradient(dz, frozen, ctx.gate_bias_dtype)
    if needs.gates:
        gates = pad(dz, (frozen, 0)).to(saved.z.dtype)  # z are the gates themselves
    return GateGradients(weight, bias, gates)


def gate_weight_gradient(dz: Tensor, frozen: int, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """dzᵀ x̄ below `frozen` rows of 0: [T, d_in]."""
    gradient = (dz.to(seen.dtype).mT @ seen).to(dtype)
    return pad(gradient, (0, 0, frozen, 0)) if frozen else gradient


def gate_bias_gradient(dz: Tensor, frozen: int, dtype: torch.dtype) -> Tensor:
    """Σ dz behind `frozen` zeros: [T]."""
    gradient = dz.sum(0).to(dtype)
    return pad(gradient, (frozen, 0)) if frozen else gradient
