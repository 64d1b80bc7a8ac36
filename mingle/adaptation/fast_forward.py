"""Faster products while only gates change: on CPUs the faster library, in bf16 weights that are cast once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from mingle.kernels import gemm
from mingle.kernels.dtypes import wide
from mingle.nn.conv1d import is_conv1d
from mingle.nn.matrices import is_linear, oriented

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

PRECISIONS = ("fp32", "bf16")
#: what a linear layer multiplies by, without its gates
_FACTORS = ("weight", "bias", "A", "B_transposed")


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """While the block runs, a model's plain linear layers multiply in the faster library on CPUs.

    `MingleLinear` does so anyway.  Results differ from the layers' own by rounding.  Layers whose weights
    train, and calls under autocast, stay as they are.
    """
    plain = [
        module
        for module in model.modules()
        if (type(module) is nn.Linear or is_conv1d(module)) and module.weight.device.type == "cpu"
    ]
    plain = [module for module in plain if "forward" not in vars(module)]
    try:
        for module in plain:
            module.forward = partial(_multiply, module, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module in plain:
            del module.forward  # the class has it


def _multiply(layer: nn.Linear | Conv1D, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The output of `layer`, whose own `forward` this stands in for, for x [..., d_in]: [..., d_out]."""
    weight, bias = oriented(layer.weight, layer), layer.bias
    learns = torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (weight, bias)
    )
    if learns or x.dim() < 2 or torch.is_autocast_enabled(x.device.type):
        return forward(x)
    product = _Frozen.apply if torch.is_grad_enabled() and x.requires_grad else gemm.linear
    y: Tensor = product(x.flatten(0, -2), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


class _Frozen(torch.autograd.Function):
    """x Wᵀ + b of a frozen layer: only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return gemm.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gemm.linear(grads[0], weight.mT), None, None


@contextmanager
def lowered(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While the block runs, the frozen factors of all linear layers are held in `dtype`.

    Autocast then need not cast them at every call.  Afterwards the layers have their own parameters again.
    """
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name in _FACTORS if is_linear(module) else ():
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
                kept.append((module, name, parameter))
    try:
        for module, name, parameter in kept:
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter)


class _WideAttention(TorchFunctionMode):
    """Attention in fp32: a CPU takes four times as long for its gradient in bf16."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.to(wide(value)) if isinstance(value, Tensor) and value.is_floating_point() else value


def prepared(model: nn.Module, precision: str) -> AbstractContextManager[object]:
    """A block for many passes in `precision`, in which nothing but gates may change."""
    return lowered(model, torch.bfloat16) if precision == "bf16" else fast_linears(model)


@contextmanager
def running(precision: str, device: torch.device) -> Iterator[None]:
    """A block for one forward pass in `precision`, ``"fp32"`` or ``"bf16"``.

    In bf16 products are under autocast, and attention on CPUs stays in fp32.
    """
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(_WideAttention())
        yield
