"""Subclasses of `torch.nn.Linear` that compute what a Linear computes, and those that do not."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn


def computes_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a Linear, or of a subclass that computes the same in words of its own, as Falcon's.

    A subclass with its own `forward` is tried on a small weight.  One without is refused, as
    `torch.nn.MultiheadAttention` reads the weight of its ``out_proj`` and never calls it; and so is one with
    anything beside weight and bias, or with hooks.
    """
    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    own = {*module._parameters, *module._buffers, *module._modules}
    if own != {"weight", "bias"} or module._forward_hooks or module._forward_pre_hooks:
        return False
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        tried = nn.Linear(2, 3, bias=module.bias is not None, device="cpu", dtype=torch.float64)
        x = torch.randn(2, 4, 2, device="cpu", dtype=torch.float64)
        expected = tried(x)
        tried.__class__ = type(module)
        tried.training = module.training
        try:
            return torch.allclose(tried(x), expected)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False
