"""Guard bands: tensors that lie in larger buffers of NaN, so that no access outside goes unseen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def nothing(tensor: Tensor) -> float | int:
    """What stands where a kernel has nothing to read or has not written yet."""
    return math.nan if tensor.is_floating_point() else tensor.dtype == torch.bool or -7


class Guard:
    """Tensors inside larger buffers of NaN (of True for masks, −7 for integers), and a check that nothing
    happened around them.
    """

    # elements before and behind: more than a tile reaches, or a fault would end the process
    BAND = 4096
    MARGIN = 3  # elements at both ends of every dimension

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[Tensor] = []

    def around(self, tensor: Tensor, dense: bool = False) -> Tensor:
        """A copy of `tensor` with guards before and behind and, unless it must be `dense`, at both ends of
        every row.
        """
        dense = dense or tensor.dim() < 2
        sizes = list(tensor.shape) if dense else [size + 2 * self.MARGIN for size in tensor.shape]
        buffer = torch.full((math.prod(sizes) + 2 * self.BAND,), nothing(tensor), dtype=tensor.dtype)
        inner = buffer[self.BAND : -self.BAND].view(sizes)
        if not dense:
            inner = inner[tuple(slice(self.MARGIN, -self.MARGIN) for _ in sizes)]
        inner.copy_(tensor)
        self.buffers.append((buffer, buffer.clone()))
        return inner

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Give launchers outputs of NaN in guarded buffers."""
        original = torch.Tensor.new_empty

        def new_empty(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
            plain = original(tensor, *size, **options)
            if plain.numel() == 0:
                return plain
            self.outputs.append(self.around(plain.fill_(nothing(plain)), dense=True))
            return self.outputs[-1]

        with mock.patch.object(torch.Tensor, "new_empty", new_empty):
            yield

    def check(self, complete: bool = True) -> None:
        """Outputs are complete where they should be; around them, and in the inputs, everything is as it was.

        Overwrites the outputs.
        """
        for output in self.outputs:
            assert not (complete and output.isnan().any()), (
                "an element of an output was not written, or a NaN from outside an input reached it"
            )
            output.fill_(nothing(output))
        for buffer, before in self.buffers:
            assert torch.equal(buffer.nan_to_num(7.5), before.nan_to_num(7.5)), (
                "an input was changed, or something outside an output"
            )
