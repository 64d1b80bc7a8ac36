"""The n-th largest of numbers that come a tensor at a time: exact, in a few passes, in constant memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide

#: bits that a pass finds, and how many numbers are looked at together: few enough to stay in a core's cache
#: and in memory that is used again, which takes half the time
_BITS, _TOGETHER = 16, 1 << 17


def passes(dtype: torch.dtype) -> int:
    """How many passes over numbers of a floating-point dtype find one of them by its rank."""
    return 8 * dtype.itemsize // _BITS


class DigitCount:
    """One pass: how often each value of the next 16 bits occurs among numbers with given leading bits.

    The bits of floating-point numbers without a sign, read as whole numbers, have the numbers' own order.  So
    the leading 16 bits of the n-th largest are found by counting, then those that follow among the numbers
    that have these, and so on.

    Args:
        number: of the pass, from 0.
        leading: the bits that earlier passes found, as a whole number.
        dtype: float32 or float64, in which the magnitudes are compared.

    Attributes:
        counts: how often each value occurs, int64 [2¹⁶]; those of several passes over parts add up.
    """

    def __init__(self, number: int, leading: int, dtype: torch.dtype) -> None:
        self.leading, self.dtype = leading, dtype
        self._whole = torch.int32 if dtype == torch.float32 else torch.int64
        self._below = 8 * dtype.itemsize - _BITS * (number + 1)  # how many bits come after these
        self._first = number == 0
        self.counts = torch.zeros(1 << _BITS, dtype=torch.int64)

    def add(self, tensor: Tensor) -> None:
        """Count the magnitudes of a tensor's entries."""
        for part in tensor.reshape(-1).split(_TOGETHER):
            bits = part.abs().to(self.dtype).view(self._whole)
            if not self._first:
                bits = bits[(bits >> (self._below + _BITS)) == self.leading]
            digits = (bits >> self._below) & ((1 << _BITS) - 1)
            self.counts += torch.bincount(digits, minlength=1 << _BITS).cpu()

    def found(self, rank: int) -> tuple[int, int]:
        """The leading bits with those of this pass, and the rank that is left among the numbers with these.

        Args:
            rank: n, from 1, among the numbers that were counted.
        """
        at_least = self.counts.flip(0).cumsum(0)
        place = int((at_least < rank).sum())
        above = int(at_least[place - 1]) if place else 0
        return (self.leading << _BITS) + (1 << _BITS) - 1 - place, rank - above


def magnitude(bits: int, dtype: torch.dtype) -> float:
    """The number whose bits all passes together found."""
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    return torch.tensor(bits, dtype=whole).view(dtype).item()


def nth_largest(tensors: list[Tensor], rank: int) -> float:
    """The magnitude of rank n, from 1, among the entries of all tensors together."""
    dtype = torch.float64 if any(wide(tensor) == torch.float64 for tensor in tensors) else torch.float32
    bits = 0
    for number in range(passes(dtype)):
        count = DigitCount(number, bits, dtype)
        for tensor in tensors:
            count.add(tensor)
        bits, rank = count.found(rank)
    return magnitude(bits, dtype)
