"""What the operators share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mingle.kernels.gated_experts import grouped
from mingle.ops.operands import FoldedOperands, LowRankOperands


class Operator(NamedTuple):
    """One operator in three forms."""

    registered: Callable[..., Any]  # what tracers see
    differentiable: Callable[..., Any]  # eager, with a backward
    plain: Callable[..., Any]  # eager, without

    def __call__(self, save: bool, *arguments: Any) -> Any:
        """Apply the form that fits; `save`: a backward may follow.  The first argument is a tensor."""
        if (
            torch.compiler.is_compiling()
            or type(arguments[0]) not in (Tensor, torch.nn.Parameter)
            or torch._C._len_torch_dispatch_stack()
        ):
            return self.registered(*arguments)
        return (self.differentiable if save else self.plain)(*arguments)


def kernels_of(backend: str) -> ModuleType:
    """The module whose `shrink`, `expand` and `upstream` compute."""
    # Triton is imported at its first use: it may be absent, and it is slow to load.
    return grouped if backend == "grouped" else importlib.import_module("mingle.kernels.gated_experts.triton")


def share_of_a_token(dz: Tensor, mask: Tensor | None, group: int) -> Tensor:
    """What one valid token receives of its group's gate gradient [G, T]: the derivative of the mean."""
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


class Saved(NamedTuple):
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


class Gates(NamedTuple):
    """One value for each of the arguments that gates come from."""

    gate_weight: Any = None
    gate_bias: Any = None
    gates: Any = None


def keep(
    ctx: Any, given: LowRankOperands | FoldedOperands, output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Keep on `ctx` what the backward needs of the operands and of the results y, product, z and x̄."""
    _, product, z, pooled = output
    ctx.mark_non_differentiable(product, z, pooled)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *Saved(given.x, given.weight, given.A, given.B, given.gate_weight, given.mask, product, z, pooled)
    )
    sources = given.gate_weight, given.gate_bias, given.gates
    ctx.gate_dtypes = Gates(*[None if source is None else source.dtype for source in sources])
    ctx.frozen_gates = given.frozen_gates


def gate_gradients(
    needs: LowRankOperands | FoldedOperands, dtypes: Gates, dz: Tensor, frozen: int, seen: Tensor
) -> Gates:
    """The gradients of linear and of given gates, 0 for the first `frozen` ones; None where there is no need.

    Args:
        needs: true for the operands that need a gradient.
        dtypes: of the gradients.
        dz: [G, T − frozen], of the gate values.
        seen: what the gates saw, [G, d_in].
    """
    return Gates(
        gate_weight_gradient(dz, frozen, seen, dtypes.gate_weight) if needs.gate_weight else None,
        gate_bias_gradient(dz, frozen, dtypes.gate_bias) if needs.gate_bias else None,
        pad(dz, (frozen, 0)).to(dtypes.gates) if needs.gates else None,
    )


def gate_weight_gradient(dz: Tensor, frozen: int, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """dzᵀ x̄ below `frozen` rows of 0: [T, d_in]."""
    return pad((dz.to(seen.dtype).mT @ seen).to(dtype), (0, 0, frozen, 0))


def gate_bias_gradient(dz: Tensor, frozen: int, dtype: torch.dtype) -> Tensor:
    """Σ dz behind `frozen` zeros: [T]."""
    return pad(dz.sum(0).to(dtype), (frozen, 0))
