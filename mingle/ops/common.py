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


class Operator(NamedTuple):
    """One operator in three forms."""

    registered: Callable[..., Any]  # what tracers see
    differentiable: Callable[..., Any]  # eager, with a backward
    plain: Callable[..., Any]  # eager, without

    def __call__(self, save: bool, *arguments: Any) -> Any:
        """Apply the form that fits; `save` says that a backward may follow.  The first argument is a tensor."""
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


def differentiable(plain: Callable[..., Any], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` with a backward, past the dispatcher; `gradients` takes the context and dy, and its result
    cannot be differentiated again.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # Without a `setup_context`, for which PyTorch binds the arguments to a signature at every call,
            # 45 µs each time.
            output = plain(*inputs)
            save_for_backward(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, grads[0])

    return Eager.apply


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, A, B, gate_weight, gate_bias, gates, mask, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, A, B, gate_weight, mask, *output[1:])
    ctx.options = options
    ctx.gate_dtypes = [None if gate is None else gate.dtype for gate in (gate_weight, gate_bias, gates)]


def gate_gradients(ctx: Any, dz: Tensor, frozen: int, seen: Tensor) -> list[Tensor | None]:
    """Gradients of gate_weight, gate_bias and gates from dz [G, T − frozen] and what the gates saw [G, d_in];
    0 for the frozen ones.
    """
    need_weight, need_bias, need_gates = ctx.needs_input_grad[5:8]
    weight, bias, gates = ctx.gate_dtypes
    return [
        gate_weight_gradient(dz, frozen, seen, weight) if need_weight else None,
        gate_bias_gradient(dz, frozen, bias) if need_bias else None,
        pad(dz, (frozen, 0)).to(gates) if need_gates else None,
    ]


def gate_weight_gradient(dz: Tensor, frozen: int, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """dzᵀ x̄ below `frozen` rows of 0: [T, d_in]."""
    return pad((dz.to(seen.dtype).mT @ seen).to(dtype), (0, 0, frozen, 0))


def gate_bias_gradient(dz: Tensor, frozen: int, dtype: torch.dtype) -> Tensor:
    """Σ dz behind `frozen` zeros: [T]."""
    return pad(dz.sum(0).to(dtype), (frozen, 0))
