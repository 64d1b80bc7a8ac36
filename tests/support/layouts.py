"""Tensors that lie in memory in every way that strides can describe, as hypothesis draws them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

_DIMENSIONS = (-4, -3, -2, -1)


class Layout(NamedTuple):
    """How a tensor of at most four dimensions lies in its storage; they are counted from the last one, −1.

    Attributes:
        order: the dimensions from the outermost in memory to the innermost.
        steps: how many places an element takes, by dimension.
        offset: places before the first element.
        expanded: dimensions with a stride of 0.
    """

    order: tuple[int, ...] = _DIMENSIONS
    steps: tuple[int, ...] = (1, 1, 1, 1)
    offset: int = 0
    expanded: frozenset[int] = frozenset()

    def of(self, tensor: Tensor) -> Tensor:
        """`tensor` so laid out, where it is expanded with its first entry throughout.

        Before and between its elements lies what no result may show: NaN, or True for a mask.
        """
        kept = tensor
        for dim in self.expanded:
            if dim >= -tensor.dim() and tensor.shape[dim] > 0:
                kept = kept.narrow(dim, 0, 1)
        order = [dim for dim in self.order if dim >= -tensor.dim()]
        room = [kept.shape[dim] * self.steps[dim] for dim in order]
        storage = tensor.new_full(
            (self.offset + math.prod(room),), math.nan if tensor.is_floating_point() else 1
        )
        inner = storage[self.offset :].view(room)[tuple(slice(None, None, self.steps[dim]) for dim in order)]
        inner = inner.permute([order.index(dim) for dim in range(-tensor.dim(), 0)])
        return inner.copy_(kept).expand(tensor.shape)


layouts = st.builds(
    Layout,
    order=st.permutations(_DIMENSIONS).map(tuple),
    steps=st.tuples(*[st.integers(1, 2)] * 4),
    offset=st.integers(0, 3),
    expanded=st.frozensets(st.sampled_from(_DIMENSIONS), max_size=2),
)


def layouts_of(*names: str) -> st.SearchStrategy[dict[str, Layout]]:
    """One layout for each of these tensors."""
    return st.fixed_dictionaries(dict.fromkeys(names, layouts))


def dense(tensor: Tensor) -> Tensor:
    """The same values, one after another from the start of a storage."""
    return tensor.clone(memory_format=torch.contiguous_format)
