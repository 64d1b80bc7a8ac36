"""Random matrices that depend on a seed and a key alone: not on a batch, an order, or earlier draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2⁶⁴ / golden ratio as a signed integer: SplitMix64's increment
_MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))  # and its finaliser's shifts and factors


def gaussian(
    seed: int, keys: Sequence[str | int], rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Standard normal numbers [len(keys), rows, columns], each a function of its seed, key and place.

    They come from SplitMix64.  The integers behind them are the same on every device.
    """
    # Made on a GPU, the tensor would wait for it.
    starts = torch.tensor([_start(seed, key) for key in keys]).to(device, non_blocking=True)
    counters = torch.arange(1, rows * columns + 1, device=device) * _GOLDEN
    bits = _mixed(starts[:, None] + counters)
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-51 - 1  # 52 bits, symmetric in (−1, 1)
    return torch.erfinv(uniform).mul_(2**0.5).view(len(keys), rows, columns).to(dtype)


def _start(seed: int, key: str | int) -> int:
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _mixed(state: Tensor) -> Tensor:
    for shift, factor in _MIXERS:
        state = (state ^ _shifted(state, shift)) * factor
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """A logical right shift; PyTorch's own copies the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
