"""Which weights of a model are matrices, which way round they are kept, and how many lie in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from mingle.nn.conv1d import is_conv1d
from mingle.nn.linear import MingleLinear

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

AnyLinear: TypeAlias = "nn.Linear | Conv1D | MingleLinear"

_EXPERTS = re.compile("experts", re.IGNORECASE)


def is_linear(module: nn.Module) -> TypeGuard[AnyLinear]:
    """Whether a module is a linear layer: torch's, GPT-2's `Conv1D`, or a `MingleLinear` made of either."""
    return isinstance(module, nn.Linear | MingleLinear) or is_conv1d(module)


def transposed(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is [d_in, d_out] in its state dict, as a `Conv1D`'s is."""
    return is_conv1d(layer) or (isinstance(layer, MingleLinear) and layer.transposed)


def oriented(weight: Tensor, layer: nn.Module) -> Tensor:
    """A weight from the state dict of a linear layer as [d_out, d_in], or one of that shape as it is kept."""
    return weight.mT if transposed(layer) else weight


def widths(layer: AnyLinear) -> tuple[int, int]:
    """d_out and d_in of a linear layer."""
    if isinstance(layer, nn.Linear | MingleLinear):
        return layer.out_features, layer.in_features
    d_in, d_out = layer.weight.shape
    return d_out, d_in


@dataclass(frozen=True)
class Layout:
    """How a tensor of a state dict holds matrices [d_out, d_in].

    Attributes:
        transposed: each of them as [d_in, d_out].
        experts: how many lie one after the other, [E, ...]; None where the tensor is one matrix.
    """

    transposed: bool = False
    experts: int | None = None

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The matrices [d_out, d_in] in a tensor, views of it, each under a name of its own."""
        tensor = tensor.mT if self.transposed else tensor
        if self.experts is None:
            return {name: tensor}
        return {f"{name}.{i}": matrix for i, matrix in enumerate(tensor)}

    def joined(self, name: str, matrices: Mapping[str, Tensor]) -> Tensor:
        """The tensor that `split` takes apart."""
        if self.experts is None:
            tensor = matrices[name]
        else:
            tensor = torch.stack([matrices[f"{name}.{i}"] for i in range(self.experts)])
        return tensor.mT if self.transposed else tensor


def split(layouts: Mapping[str, Layout], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices [d_out, d_in] in those tensors of a state that have a layout, views of them."""
    return {
        key: matrix
        for name, layout in layouts.items()
        for key, matrix in layout.split(name, tensors[name]).items()
    }


def joined(layouts: Mapping[str, Layout], matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `split` takes apart."""
    return {name: layout.joined(name, matrices) for name, layout in layouts.items()}


def matrices(model: nn.Module) -> dict[str, Layout]:
    """The weights of a model's linear layers and its packed experts, by their names in the state dict."""
    linear = {
        f"{name}.weight": Layout(transposed(module))
        for name, module in model.named_modules()
        if is_linear(module)
    }
    return linear | packed_experts(model)


def packed_experts(model: nn.Module) -> dict[str, Layout]:
    """The parameters in which a mixture of experts keeps the matrices of all its experts, by name.

    They are found by looking: three-dimensional floating-point parameters, other than a convolution's, of
    modules with ``experts`` in their path or in the name of their class.
    """
    found: dict[str, Layout] = {}
    for path, module in model.named_modules():
        named = _EXPERTS.search(path) or _EXPERTS.search(type(module).__name__)
        if not named or isinstance(module, nn.Conv1d | MingleLinear):
            continue
        packed = {
            f"{path}.{name}".removeprefix("."): parameter
            for name, parameter in module.named_parameters(recurse=False)
            # [E, 1, d] are biases
            if parameter.dim() == 3 and parameter.is_floating_point() and min(parameter.shape[1:]) > 1
        }
        turned = _kept_transposed(module, list(packed.values()))
        found |= {name: Layout(turned, len(parameter)) for name, parameter in packed.items()}
    return found


def _kept_transposed(module: nn.Module, packed: list[nn.Parameter]) -> bool:
    """Whether a module keeps its experts' matrices as [E, d_in, d_out].

    Most modules of transformers say so.  Of the others, one is known by a first matrix that makes gate and up
    values together, twice as many as the last one reads.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool) or not packed:
        return bool(said)
    (_, width, both), (_, inner, out) = packed[0].shape, packed[-1].shape
    return width == out and both == 2 * inner
