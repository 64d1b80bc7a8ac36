"""Which tile a Triton kernel runs with: the rule's invariants on several chips."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from chips import CHIPS, H100, ITEMSIZE, KERNELS, area, stage_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from mingle.kernels import tile_rule, tiles
from mingle.kernels.tiles import Tile

pytestmark = pytest.mark.usefixtures("own_tiles")

STRAINS = ("plain", "special", "ragged")
FORMS = [strain + may for strain in STRAINS for may in ("", " splits", " described", " splits described")]

launches = given(
    kernel=st.sampled_from(KERNELS),
    chip=st.sampled_from(sorted(CHIPS)).map(CHIPS.__getitem__),
    arithmetic=st.sampled_from(sorted(ITEMSIZE)),
    rows=st.integers(1, 1 << 20).map(tiles.bucket),
    columns=st.integers(1, 20_000),
    depth=st.integers(1, 20_000),
    form=st.sampled_from(FORMS),
)


@given(st.integers(1, 1 << 31))
def test_buckets_are_the_next_power_of_two_from_sixteen_on(tokens):
    size = tiles.bucket(tokens)
    assert size >= 16 and size & (size - 1) == 0
    assert tokens <= size
    assert size == 16 or tokens > size // 2


@settings(deadline=None, derandomize=True)
@launches
def test_tiles_are_powers_of_two_that_a_matrix_instruction_takes(
    kernel, chip, arithmetic, rows, columns, depth, form
):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, depth, form)
    assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:3])
    assert tile.warps in (4, 8)
    assert tile.stages >= 2


@settings(deadline=None, derandomize=True)
@launches
def test_all_stages_fit_in_shared_memory(kernel, chip, arithmetic, rows, columns, depth, form):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, depth, form)
    assert tile.stages * stage_bytes(tile, arithmetic) <= chip.shared_memory


@settings(deadline=None, derandomize=True)
@launches
def test_parts_and_descriptors_only_where_they_may_be(kernel, chip, arithmetic, rows, columns, depth, form):
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, depth, form)
    if tile.splits > 1:
        assert "splits" in form and not tile.described
        splits, part = tiles.shares(depth, tile)
        assert part % tile.depth == 0 and (splits - 1) * part < depth <= splits * part
    if tile.described:
        assert "described" in form and chip.kind == "cuda" and chip.capability >= 90


@settings(deadline=None, derandomize=True)
@launches
def test_more_tokens_are_never_held_for_faster(kernel, chip, arithmetic, rows, columns, depth, form):
    few, many = (
        tiles.seconds(
            tiles.rule(kernel, chip, arithmetic, tokens, columns, depth, form),
            chip, arithmetic, tokens, columns, depth,
        )
        for tokens in (rows, 2 * rows)
    )  # fmt: skip
    assert 0 < few <= many * 1.01 + 1e-6  # the rule compares tiles with as many stages as they would like


@settings(deadline=None, derandomize=True)
@launches
def test_a_launch_that_strains_the_registers_gets_no_tile_that_is_too_large_for_it(
    kernel, chip, arithmetic, rows, columns, depth, form
):
    strain = form.split()[0]
    tile = tiles.rule(kernel, chip, arithmetic, rows, columns, depth, form)
    assert tile.described or area(tile) <= max(area(other) for other in tile_rule.allowed(arithmetic, strain))


def test_the_published_cases_get_what_was_fastest_on_an_h100():
    """Large products by descriptors in the largest tile, small ones in parts (bench/results)."""
    form = "plain splits described"

    def tile(kernel, tokens, columns, depth):
        return tiles.rule(kernel, H100, "bfloat16", tiles.bucket(tokens), columns, depth, form)

    for kernel, sizes in {"shrink": (25216, 1280, 768), "expand": (25216, 768, 2048)}.items():
        assert (tile(kernel, *sizes).described, area(tile(kernel, *sizes))) == (True, 128 * 256)
    assert tile("expand", 800, 3072, 1280).described
    assert tile("expand", 50, 768, 2048).splits > 1 and tile("expand", 1, 4096, 4608).splits > 1
    assert tile("shrink", 800, 512, 768).splits == 1 and area(tile("shrink", 800, 512, 768)) == 64 * 64


@pytest.mark.parametrize("chip", CHIPS)
def test_the_largest_tile_goes_only_where_registers_hold_it(chip):
    """128 × 256 takes Hopper's wgmma or the tensor memory of B200s, and no fold: elsewhere it spills."""
    for kernel, arithmetic in product(KERNELS, ITEMSIZE):
        tile = tiles.rule(kernel, CHIPS[chip], arithmetic, 1 << 17, 3072, 768)
        possible = chip in ("H100", "B200") and kernel != "fold" and arithmetic in ("float16", "bfloat16")
        assert (area(tile) == 128 * 256) == possible, (kernel, arithmetic)


@pytest.mark.parametrize("arithmetic", ITEMSIZE)
def test_the_interpreter_gets_tiles_that_small_tensors_span_several_of(arithmetic):
    tile = tiles.rule("expand", tiles.INTERPRETER, arithmetic, 1 << 20, 1 << 20, 768)
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
            tiles.rule("expand", CHIPS[chip], arithmetic, 1 << 17, 3072, 768, which)
            for which in (strain, "plain")
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
        (torch.empty(5 * 48 + 1)[1:].view(5, 48), "ragged"),  # begins four bytes behind a multiple of 16
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


def test_a_launch_that_takes_too_much_gets_the_next_smaller_tile_and_says_so_once(caplog):
    triton = pytest.importorskip("triton")
    seen = []

    def run(tile: Tile) -> None:
        seen.append(tile)
        if tile.described or tile.stages * stage_bytes(tile, "bfloat16") > 60_000:
            raise triton.runtime.errors.OutOfResources(1 << 18, 60_000, "shared memory")

    large = Tile(128, 256, 64, 8, 3, described=True)
    tiles.launched("expand", large, run)
    fitting = Tile(128, 64, 64, 8, 2)
    assert seen == [
        large,
        *(Tile(128, 256, 64, 8, stages) for stages in (3, 2)),
        Tile(128, 128, 64, 8, 2),
        fitting,
    ]
    seen.clear()
    tiles.launched("expand", large, run)
    assert seen == [fitting]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and "needs more than this chip has" in told[0]

    def never(tile: Tile) -> None:
        assert tile.rows == 64
        raise triton.runtime.errors.OutOfResources(1 << 18, 1, "shared memory")

    with pytest.raises(triton.runtime.errors.OutOfResources):  # as many rows as the list of experts is for
        tiles.launched("expand", Tile(64, 64, 64, 4, 2), never, rows=False)


def test_threads_have_registers_for_the_parts_that_they_add_up():
    for splits in tile_rule._SPLITS:
        tile = tile_rule.adding(splits)
        assert splits * area(tile) <= 128 * 32 * tile.warps  # beside 127 of their own
