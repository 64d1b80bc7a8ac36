"""Which gates an encoder's outputs came with, whoever passes them on to the decoder."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

#: samples that are remembered
_SAMPLES = 2**16
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Encodings:
    """A memory of the gates of samples, which finds them by the samples' encoded tokens.

    An encoder's outputs are computed once, and then used for many steps of a decoder: repeated for every
    beam, chosen from, or after those of another batch.  So rows are told by their bits.  Copies begin empty.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[int, Tensor] = OrderedDict()
        self._latest: Tensor | None = None
        self._found: tuple[weakref.ref[Tensor], Tensor] | None = None

    def note(self, hidden: Any, gates: Tensor) -> None:
        """Remember the gates [n, T] of an encoder's outputs [n, N, d]; anything else is passed over."""
        self._latest = gates
        if not isinstance(hidden, Tensor) or len(hidden) != len(gates):
            return
        self._found = weakref.ref(hidden), gates
        for row, own in zip(_digests(hidden), gates.unbind(), strict=True):
            self._rows[row] = own
            self._rows.move_to_end(row)
        while len(self._rows) > _SAMPLES:
            self._rows.popitem(last=False)

    def gates(self, hidden: Tensor) -> Tensor:
        """The gates of encoded samples, [n, T]; for unknown ones, those noted last.

        Args:
            hidden: [n, N, d].

        Raises:
            ValueError: unknown samples, of another number than those noted last or a multiple of it.
        """
        if self._found is not None and self._found[0]() is hidden:
            return self._found[1]
        rows = [self._rows.get(row) for row in _digests(hidden)]
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):  # something was done to them on their way
            if self._latest is None or len(hidden) % len(self._latest):
                count = f"{len(hidden)} encoded samples"
                raise ValueError(
                    f"{count}, of which {len(rows) - len(known)} are not from this model's encoder"
                )
            return self._latest
        gates = torch.stack(known)
        self._found = weakref.ref(hidden), gates
        return gates

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _digests(hidden: Tensor) -> list[int]:
    """A number for each row's bits, whatever else is in the batch.

    Args:
        hidden: [n, N, d].
    """
    bits = hidden.detach().contiguous().view(_WHOLE_NUMBERS[hidden.element_size()]).flatten(1).long()
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 0x9E3779B97F4A7C1 | 1
    return (bits * factors).sum(1).tolist()
