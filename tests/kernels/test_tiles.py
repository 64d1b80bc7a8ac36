"""Which tile a Triton kernel runs with: the rule's invariants on several chips, and what takes precedence
over the rule.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="kernels.configs belongs to the Triton kernels")

from mingle.kernels import tiles  # noqa: E402
from mingle.kernels.tiles import Chip, Tile  # noqa: E402

H100 = Chip("cuda", "NVIDIA H100", 90, 132, 232_448)
CHIPS = {
    "H100": H100,
    "A100": Chip("cuda", "NVIDIA A100", 80, 108, 166_912),
    "A10": Chip("cuda", "NVIDIA A10", 86, 72, 101_376),
    "B200": Chip("cuda", "NVIDIA B200", 100, 148, 232_448),
    "RTX 5090": Chip("cuda", "NVIDIA GeForce RTX 5090", 120, 170, 101_376),
    "MI300X": Chip("hip", "AMD Instinct MI300X", 94, 304, 65_536),
}
STRAINS = ("plain", "special", "ragged")
KERNELS = ("shrink", "expand", "upstream", "fold")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}

launches = given(
    kernel=st.sampled_from(KERNELS),
    chip=st.sampled_from(sorted(CHIPS)).map(CHIPS.__getitem__),
    arithmetic=st.sampled_from(sorted(ITEMSIZE)),
    rows=st.integers(1, 1 << 20).map(tiles.bucket),
    columns=st.integers(1, 20_000),
    strain=st.sampled_from(STRAINS),
)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "COMMITTED", {})
    forget()
    yield
    forget()


def forget() -> None:
    tiles._choose.cache_clear()
    tiles.store.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, chip: Chip) -> None:
    """Take every tensor for one on `chip`, in another process than before."""
    monkeypatch.setattr(tiles, "chip", lambda device: chip)
    forget()


def programs(tile: Tile, rows: int, columns: int) -> int:
    return math.ceil(rows / tile.rows) * math.ceil(columns / tile.columns)


def area(tile: Tile) -> int:
    return tile.rows * tile.columns


def stage_bytes(tile: Tile, arithmetic: str) -> int:
    """Both operands of one step: [rows, depth] and [depth, columns]."""
    return (tile.rows * tile.depth + tile.depth * tile.columns) * ITEMSIZE[arithmetic]


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


X = torch.zeros(1, dtype=torch.bfloat16)
LAUNCH = ("expand", X, 800, 3072, 768)  # kernel, operand, tokens, columns, depth
KEY = "NVIDIA H100, expand bfloat16 1024x3072x768 plain"
FOUND, SHIPPED = Tile(32, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2)


def test_the_rule_serves_what_nobody_measured(monkeypatch):
    on(monkeypatch, H100)
    assert tiles.choose(*LAUNCH) == tiles.rule("expand", H100, "bfloat16", 1024, 3072)


def test_a_committed_tile_comes_before_the_rule_and_a_found_one_before_it(monkeypatch):
    on(monkeypatch, H100)
    monkeypatch.setitem(tiles.COMMITTED, KEY, SHIPPED)
    assert tiles.choose(*LAUNCH) == SHIPPED
    tiles.store().put(KEY, FOUND)
    forget()
    assert tiles.choose(*LAUNCH) == FOUND
    assert isinstance(tiles.choose(*LAUNCH), Tile)  # JSON knows only lists


def test_a_measured_tile_holds_for_its_own_launch_only(monkeypatch):
    on(monkeypatch, H100)
    monkeypatch.setitem(tiles.COMMITTED, KEY, SHIPPED)
    for tokens in (513, 800, 1024):  # one bucket
        assert tiles.choose("expand", X, tokens, 3072, 768) == SHIPPED
    kernel, x, tokens, columns, depth = LAUNCH
    for other in (
        ("shrink", x, tokens, columns, depth),
        (kernel, x.half(), tokens, columns, depth),
        (kernel, x, 1025, columns, depth),
        (kernel, x, tokens, 768, depth),
        (kernel, x, tokens, columns, 3072),
    ):
        assert tiles.choose(*other) != SHIPPED
    for strain in ("special", "ragged"):
        assert tiles.choose(*LAUNCH, strain) == tiles.rule("expand", H100, "bfloat16", 1024, 3072, strain)
    on(monkeypatch, CHIPS["A100"])
    assert tiles.choose(*LAUNCH) != SHIPPED


def timer(
    seconds: Callable[[Tile], float],
) -> tuple[Callable[[], object], Callable[[Callable[[], object]], float], list[Tile]]:
    """A launch, a clock by which it takes `seconds` of the tile it was launched with, and the tiles it saw."""
    seen: list[Tile] = []

    def launch() -> None:
        seen.append(tiles.choose(*LAUNCH))

    def time(call: Callable[[], object]) -> float:
        call()
        return seconds(seen[-1])

    return launch, time, seen


TRIED = [Tile(128, 128, 64, 8, 3), FOUND, Tile(16, 32, 64, 4, 4)]


def test_search_keeps_the_fastest_for_this_user_and_chip(monkeypatch, tmp_path):
    on(monkeypatch, H100)
    launch, time, seen = timer(lambda tile: 1.0 if tile == FOUND else 2.0)
    assert tiles.choose(*LAUNCH) != FOUND
    assert tiles.search(*LAUNCH, launch, time, TRIED) == FOUND
    assert seen == TRIED
    assert tiles.choose(*LAUNCH) == FOUND
    assert tiles.choose("expand", X, 513, 3072, 768) == FOUND  # the same bucket
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {KEY: list(FOUND)}
    on(monkeypatch, CHIPS["A100"])
    assert tiles.choose(*LAUNCH) != FOUND
    on(monkeypatch, H100)
    assert tiles.choose(*LAUNCH) == FOUND


@pytest.mark.parametrize(
    "error",
    [
        triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        triton.compiler.errors.CompilationError(None, ast.parse("x"), "no layout"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_search_passes_over_tiles_that_cannot_be_launched(error, monkeypatch):
    on(monkeypatch, H100)

    def seconds(tile: Tile) -> float:
        if tile == TRIED[0]:
            raise error
        return float(area(tile))

    launch, time, seen = timer(seconds)
    assert tiles.search(*LAUNCH, launch, time, TRIED) == TRIED[2]
    assert seen == TRIED


def test_search_that_launches_nothing_leaves_everything_as_it_was(monkeypatch, tmp_path):
    on(monkeypatch, H100)
    before = tiles.choose(*LAUNCH)

    def seconds(tile: Tile) -> float:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    launch, time, _ = timer(seconds)
    with pytest.raises(RuntimeError, match="expand: no tile could be launched on NVIDIA H100"):
        tiles.search(*LAUNCH, launch, time, TRIED)
    assert tiles.choose(*LAUNCH) == before
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_launch_ends_the_search_and_its_tile(monkeypatch):
    on(monkeypatch, H100)
    before = tiles.choose(*LAUNCH)

    def seconds(tile: Tile) -> float:
        raise ValueError("x has shape")

    launch, time, _ = timer(seconds)
    with pytest.raises(ValueError, match="x has shape"):
        tiles.search(*LAUNCH, launch, time, TRIED)
    assert tiles.choose(*LAUNCH) == before


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("arithmetic", ITEMSIZE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_can_be_launched_and_hold_the_rules_tiles(chip, arithmetic, kernel):
    tried = tiles.candidates(kernel, CHIPS[chip], arithmetic)
    assert len(tried) == len(set(tried))
    assert all(tile.stages * stage_bytes(tile, arithmetic) <= CHIPS[chip].shared_memory for tile in tried)
    assert all(tiles._fits(kernel, CHIPS[chip], tile) for tile in tried)
    sizes = {(tile.rows, tile.columns) for tile in tried}
    for rows in (16, 1024, 1 << 17):
        tile = tiles.rule(kernel, CHIPS[chip], arithmetic, rows, 768)
        assert (tile.rows, tile.columns) in sizes


def test_search_tries_the_candidates_unless_told_otherwise(monkeypatch):
    on(monkeypatch, H100)
    launch, time, seen = timer(lambda tile: float(area(tile)))
    tiles.search(*LAUNCH, launch, time)
    assert seen == tiles.candidates("expand", H100, "bfloat16")


def test_cpu_tensors_run_in_the_interpreter():
    assert tiles.chip(torch.device("cpu")) == tiles.INTERPRETER
