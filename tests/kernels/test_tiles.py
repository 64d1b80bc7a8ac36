"""Which tile a Triton kernel runs with: the rule's invariants on several chips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from chips import CHIPS, ITEMSIZE, KERNELS, area, stage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from mingle.kernels import tiles
from mingle.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("own_tiles")

STRAINS = ("plain", "special", "ragged")

launches = given(
    kernel=st.sampled_from(KERNELS),
    chip=st.sampled_from(sorted(CHIPS)).map(CHIPS.__getitem__),
    arithmetic=st.sampled_from(sorted(ITEMSIZE)),
    rows=st.integers(1, 1 << 20).map(tiles.bucket),
    columns=st.integers(1, 20_000),
    strain=st.sampled_from(STRAINS),
)


def programs(tile: Tile, rows: int, columns: int) -> int:
    return math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns)


@given(st.integers(1, 1 << 31))
def test_buckets_are_the_next_power_of_two_from_sixteen_on(tokens):
    size = tiles.bucket(tokens)
    assert size >= 16 and size & (size - 1) == 0
    assert tokens <= size
    assert size == 16 or tokens > size // 2


@settings(deadline=None, derandomize=True)
@launches
def test_tiles_are_powers_of_two_that_a_matrix_instruction_takes(
    kernel, chip, arithmetic, rows, columns, strain
):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, strain)
    assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:3])
    assert tile.warps in (4, 8)
    assert tile.stages >= 2


@settings(deadline=None, derandomize=True)
@launches
def test_all_stages_fit_in_shared_memory(kernel, chip, arithmetic, rows, columns, strain):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, strain)
    assert tile.stages * stage_bytes(tile, arithmetic) <= chip.shared_memory


@settings(deadline=None, derandomize=True)
@launches
def test_the_grid_fills_the_chip_where_a_tile_can(kernel, chip, arithmetic, rows, columns, strain):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, strain)
    enough = 0.9 * chip.multiprocessors
    widest = max(32, 1 << (columns - 1).bit_length())
    allowed = [
        other
        for other in tiles._tiles(arithmetic, strain)
        if tiles._fits(kernel, chip, other) and other.rows <= rows and other.columns <= widest
    ]
    if any(programs(other, rows, columns) >= enough for other in allowed):
        assert programs(tile, rows, columns) >= enough
        assert all(
            programs(other, rows, columns) < enough for other in allowed if area(other) > area(tile)
        ), "a larger tile would do"
    else:
        assert area(tile) == min(map(area, allowed))


@settings(deadline=None, derandomize=True)
@launches
def test_more_tokens_never_get_a_smaller_tile(kernel, chip, arithmetic, rows, columns, strain):
    few, many = (tiles.rule(kernel, chip, arithmetic, tokens, columns, strain) for tokens in (rows, 2 * rows))
    assert area(few) <= area(many)


@settings(deadline=None, derandomize=True)
@launches
def test_a_launch_that_strains_the_registers_never_gets_a_larger_tile(
    kernel, chip, arithmetic, rows, columns, strain
):
    strained, plain = (
        tiles.rule(kernel, chip, arithmetic, rows, columns, which) for which in (strain, "plain")
    )
    assert area(strained) <= area(plain)


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip != "RTX 5090"])
@pytest.mark.parametrize("arithmetic", ITEMSIZE)
def test_the_published_cases_get_tiles_of_their_size(chip, arithmetic):
    large, small = (
        tiles.rule("expand", CHIPS[chip], arithmetic, tiles.bucket(tokens), 768) for tokens in (25216, 50)
    )
    assert area(large) == max(
        area(tile) for tile in tiles._tiles(arithmetic) if tiles._fits("expand", CHIPS[chip], tile)
    )
    assert (small.rows, small.columns) == (16, 32)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_largest_tile_goes_only_where_registers_hold_it(chip):
    """128 × 256 takes Hopper's wgmma or the tensor memory of B200s, and no fold: elsewhere it spills."""
    for kernel, arithmetic in product(KERNELS, ITEMSIZE):
        tile = tiles.rule(kernel, CHIPS[chip], arithmetic, 1 << 17, 3072)
        possible = chip in ("H100", "B200") and kernel != "fold" and arithmetic in ("float16", "bfloat16")
        assert (area(tile) == 128 * 256) == possible, (kernel, arithmetic)


@pytest.mark.parametrize("arithmetic", ITEMSIZE)
def test_the_interpreter_gets_tiles_that_small_tensors_span_several_of(arithmetic):
    tile = tiles.rule("expand", tiles.INTERPRETER, arithmetic, 1 << 20, 1 << 20)
    assert max(tile[:3]) <= 32


@pytest.mark.parametrize(
    ("rank", "limit", "block"),
    [
        (1, 64, 16),
        (3, 64, 16),
        (16, 64, 16),
        (17, 64, 32),
        (64, 64, 64),
        (200, 64, 64),
        (200, 256, 256),
        (64, 32, 32),
    ],
)
def test_ranks_are_taken_in_powers_of_two_from_sixteen_to_the_limit(rank, limit, block):
    assert tiles.rank_block(rank, limit) == block


@pytest.mark.parametrize("chip", CHIPS)
def test_large_launches_that_strain_the_registers_get_smaller_tiles(chip):
    for arithmetic, strain in (("bfloat16", "special"), ("float16", "ragged"), ("tf32", "ragged")):
        strained, plain = (
            tiles.rule("expand", CHIPS[chip], arithmetic, 1 << 17, 3072, which) for which in (strain, "plain")
        )
        assert area(strained) < area(plain), (arithmetic, strain)


@pytest.mark.parametrize(
    ("tensor", "strain"),
    [
        (torch.empty(5, 48), "plain"),
        (torch.empty(48, 5).T, "ragged"),  # its columns are 5 apart
        (torch.empty(64, 48).T, "plain"),
        (torch.empty(5, 77)[:, :48], "ragged"),
        (torch.empty(5, 80)[:, :48], "plain"),
        (torch.empty(1, 48).expand(5, 48), "plain"),
        (torch.empty(5, 96)[:, ::2], "ragged"),
        (torch.empty(5, 768)[:, ::16], "ragged"),  # whole pieces apart
        (torch.empty(3, 7, 48), "plain"),
    ],
)
def test_rows_that_are_not_whole_pieces_strain_the_registers(tensor, strain):
    assert tiles.strain([tensor], [48], special=False) == strain
    assert tiles.strain([tensor], [48], special=True) == ("special" if strain == "plain" else "ragged")
    assert tiles.strain([tensor], [48, 40], special=False) == "ragged"


@pytest.fixture
def _fp32_settings() -> Iterator[None]:
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_fp32_settings")
def test_fp32_means_ieee_unless_the_user_allowed_tf32():
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    matmul = torch.backends.cuda.matmul
    assert tiles.precision(on_gpu) == "ieee"
    for allow, forbid in (
        (
            lambda: setattr(matmul, "fp32_precision", "tf32"),
            lambda: setattr(matmul, "fp32_precision", "ieee"),
        ),
        (lambda: setattr(matmul, "allow_tf32", True), lambda: setattr(matmul, "allow_tf32", False)),
        (
            lambda: torch.set_float32_matmul_precision("high"),
            lambda: torch.set_float32_matmul_precision("highest"),
        ),
    ):
        allow()
        assert tiles.precision(on_gpu) == "tf32"
        assert tiles._arithmetic(on_gpu) == "tf32"
        assert tiles._arithmetic(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)) == "bfloat16"
        assert tiles.precision(torch.zeros(1)) == "ieee"  # the setting speaks of CUDA products
        assert tiles._arithmetic(torch.zeros(1)) == "float32"
        forbid()
        assert tiles.precision(on_gpu) == "ieee"
        assert tiles._arithmetic(on_gpu) == "float32"


def test_cpu_tensors_run_in_the_interpreter():
    assert tiles.chip(torch.device("cpu")) == tiles.INTERPRETER
