"""The samples that each step of an adaptation sees."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches [size] that pass through all `count` samples in a new random order each time."""
    queue = torch.empty(0, dtype=torch.long)
    size = min(size, count)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def drawn(count: int, size: int, steps: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """The samples that any step uses, rising [m], and every step's batch as positions among them."""
    batches = list(islice(shuffled_batches(count, size, generator), steps))
    used = torch.cat(batches).unique()
    return used, [torch.searchsorted(used, batch) for batch in batches]
