"""Which experts are left where gates are 0, and whether tokens are sorted by them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mingle.kernels.chips import Chip, family
from mingle.kernels.tile_rule import cdiv

# Seconds of sorting beyond its bytes, and the share of the chip's matrix rate that the products of listed
# experts reach.  Both are assumed: the sorted form has been measured on no chip.
_SORT, _SHARE = 60e-6, 0.4


class Active(NamedTuple):
    """The experts with a gate that is not 0, by tile of rows.

    Rows are tokens or, with `order`, positions: position p holds token order[p // group] · group + p % group.
    """

    listed: torch.Tensor  # int32 [tiles, T + 1]: the experts of a tile in rising order, and last their number
    order: torch.Tensor | None  # int32 [G]: the groups, those with the same experts side by side
    rows: int  # of a tile


def sorting_pays(
    tokens: int, group: int, experts: int, rows: int, products: int, itemsize: int, chip: Chip
) -> bool:
    """Whether the experts that tiles no longer share are worth a sort.

    Gates are taken for one-hot ones with equally many groups to each expert: nobody reads them for this.
    Then a tile of g groups in their own order meets T (1 − (1 − 1/T)^g) experts, and a sorted one 1, and one
    more for each of the T − 1 borders between experts that falls into it.

    Args:
        products: multiplications of one token with one expert, r (d_in + d_out).
    """
    members, count = cdiv(rows, group), cdiv(tokens, rows)
    met = experts * (1 - (1 - 1 / experts) ** members)
    saved = met - min(met, 1 + (experts - 1) / count)
    speed = family(chip)
    rate = _SHARE * speed.matrix * chip.multiprocessors * 2 / itemsize
    passes = (
        2 * (tokens // group) * experts * 4 / speed.bandwidth
    )  # over the gates, for keys and for the list
    return 2 * saved * tokens * products / rate > _SORT + passes
