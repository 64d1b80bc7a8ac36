"""What is known of the chips that kernels run on."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """What the rules need to know of a processor."""

    kind: str  # "cuda", "hip" or "interpreter"
    name: str
    capability: int  # major · 10 + minor
    multiprocessors: int
    shared_memory: int  # bytes that one block may use


INTERPRETER = Chip("interpreter", "interpreter", 0, 1, 1 << 20)


class Family(NamedTuple):
    """The speed of a family of chips.

    Attributes:
        matrix: FLOP/s of one multiprocessor in bf16, as the vendor's library reaches them.
        bandwidth: bytes/s of a large copy, read and write.
        launch: seconds between small kernels of a CUDA graph.
        measured: whether on such a chip (bench/results), or else derived from data sheets.
    """

    matrix: float
    bandwidth: float
    multiprocessors: int = 132
    launch: float = 1.5e-6
    measured: bool = False


_FAMILIES = {
    80: Family(270e12 / 108, 1.6e12),
    86: Family(70e12 / 84, 0.8e12),
    89: Family(160e12 / 128, 0.85e12),
    90: Family(745e12 / 132, 2.3e12, measured=True),
    100: Family(1500e12 / 148, 6e12),
    120: Family(200e12 / 170, 1.5e12),
    94: Family(600e12 / 304, 3.5e12),  # gfx942
}


@cache
def chip(device: torch.device) -> Chip:
    """The chip behind a device; CPU tensors run in Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    kind = "hip" if torch.version.hip else "cuda"
    capability = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    return Chip(kind, properties.name, capability, properties.multi_processor_count, shared)


def family(chip: Chip) -> Family:
    """The table for `chip`: that of the newest family that is not newer."""
    known = [capability for capability in _FAMILIES if capability <= chip.capability and capability != 94]
    if chip.kind == "hip":
        known = [94]
    return _FAMILIES[max(known, default=80)]
