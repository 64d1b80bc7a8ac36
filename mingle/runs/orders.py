"""The order in which tasks arrive, as published: Python's shuffle of the suite's own order, by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable

#: The first of the ten published order seeds.
FIRST_ORDER_SEED = 42


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """The task order of a seed."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order
