"""When tokens are sorted by the experts that their gates leave, by the model of the chip."""

from __future__ import annotations

import pytest

from mingle.kernels.chips import Chip
from mingle.kernels.gated_experts.active import sorting_pays

H100 = Chip("cuda", "NVIDIA H100", 90, 132, 232_448)
A100 = Chip("cuda", "NVIDIA A100", 80, 108, 166_912)


@pytest.mark.parametrize(
    ("tokens", "group", "experts", "rows", "pays"),
    [
        (25216, 1, 64, 128, True),
        (25216, 1, 1024, 128, True),
        (8192, 1, 1024, 128, True),
        (25216, 197, 64, 128, False),  # a tile is of one sample or two as it is
        (800, 50, 1024, 64, False),
        (25216, 1, 1, 128, False),
        (50, 1, 1024, 16, False),  # too few tokens for the launches that sort
    ],
)
@pytest.mark.parametrize("chip", [H100, A100], ids=lambda chip: chip.name)
def test_tokens_are_sorted_where_their_tiles_would_meet_many_experts(
    tokens: int, group: int, experts: int, rows: int, pays: bool, chip: Chip
) -> None:
    assert sorting_pays(tokens, group, experts, rows, 64 * (768 + 768), 2, chip) == pays


def test_more_to_save_never_speaks_against_sorting() -> None:
    decided = [
        [sorting_pays(tokens, 1, 64, 128, 64 * width, 2, H100) for width in (64, 256, 1024, 4096, 16384)]
        for tokens in (1024, 8192, 65536)
    ]
    for row in (*decided, *map(list, zip(*decided, strict=True))):
        assert row == sorted(row)
    assert {answer for row in decided for answer in row} == {True, False}
