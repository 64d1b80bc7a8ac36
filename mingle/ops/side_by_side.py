"""Tensors that lie one after the other in one piece of memory, for products that take them as one matrix.

Each has a storage of its own: programs that save models take tensors of one storage for tied weights, and
save one of those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

#: what `lay` made, by device and address
_wholes: WeakValueDictionary[tuple[torch.device, int], Tensor] = WeakValueDictionary()


def movable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain parameters, such as `lay` takes."""
    first = tensors[0]
    return first.device.type in ("cpu", "cuda") and all(
        type(tensor) is nn.Parameter and tensor.dtype == first.dtype and tensor.device == first.device
        for tensor in tensors
    )


def lay(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move parameters that are `movable` into one piece of memory, in this order.

    Returns:
        All of them along their first dimension.  While the caller keeps it, `together` finds it.
    """
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(list(map(len, parameters))), strict=True):
        parameter.data = from_dlpack(part)  # with a storage that is this part alone
    _wholes[whole.device, whole.data_ptr()] = whole
    return whole


def together(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors along their first dimension, not copied; None where they do not lie as `lay` laid them."""
    first = tensors[0]
    whole = _wholes.get((first.device, first.data_ptr()))
    if whole is None:
        return None
    end = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype != whole.dtype or not tensor.is_contiguous():
            return None
        if tensor.shape[1:] != whole.shape[1:] or tensor.device != whole.device:
            return None
        end += tensor.nbytes
    rows = sum(map(len, tensors))
    return whole if rows == len(whole) else whole[:rows]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along their first dimension; not copied where they lie `together`."""
    whole = together(tensors)
    return torch.cat(list(tensors)) if whole is None else whole
