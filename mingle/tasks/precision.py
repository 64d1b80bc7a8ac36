"""The precision that the weights of a base model are held in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mingle.options import nearest, shown

#: of bases that are folders; what is summed up over tasks stays in float32
Precision = Literal["float32", "bfloat16", "float16"]


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of that name; `ValueError` for any but those of `Precision`."""
    known = get_args(Precision)
    if precision not in known:
        raise ValueError(
            f"dtype {shown(precision)}{nearest(str(precision), known)}: expected one of {', '.join(known)}"
        )
    found: torch.dtype = getattr(torch, precision)
    return found


def put_into(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change the floating-point tensors of a model's state in place; returns the model.

    What a model computes for itself, such as the frequencies of rotary embeddings, keeps its precision.
    """
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def given_to(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs as a model takes them: on its device, and where they are not whole numbers in its precision."""
    own = next(model.parameters())
    return {
        name: tensor.to(own.device, own.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
