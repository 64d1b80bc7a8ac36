"""GPT-2's linear layer, `Conv1D` in transformers: y = x W + b with W [d_in, d_out], transposed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


def is_conv1d(module: nn.Module) -> TypeGuard[Conv1D]:
    """Whether a module is a `Conv1D`, and not of a subclass, which may compute something else.

    transformers is not imported to find out: where it has not been, there is no such module.
    """
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module) is getattr(library, "Conv1D", None)


def conv1d(weight: nn.Parameter, bias: nn.Parameter) -> Conv1D:
    """A `Conv1D` that has these parameters, W [d_in, d_out] and b [d_out]."""
    from transformers.pytorch_utils import Conv1D

    d_in, d_out = weight.shape
    with torch.device("meta"):  # nothing is drawn or allocated for parameters that are replaced at once
        layer = Conv1D(d_out, d_in)
    layer.weight, layer.bias = weight, bias
    return layer
