"""Which tile takes precedence over the rule: measured, found by a search, or kept by the user."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable

import pytest
import torch
from chips import CHIPS, H100, ITEMSIZE, KERNELS, area, forget, stage_bytes

from mingle.kernels import tile_rule, tiles
from mingle.kernels.tiles import Chip, Tile

triton = pytest.importorskip("triton", reason="tiles are those of the Triton kernels")

pytestmark = pytest.mark.usefixtures("own_tiles")


def on(monkeypatch: pytest.MonkeyPatch, chip: Chip) -> None:
    """Take every tensor for one on `chip`, in another process than before."""
    monkeypatch.setattr(tiles, "chip", lambda device: chip)
    forget()


X = torch.zeros(1, dtype=torch.bfloat16)
LAUNCH = ("expand", X, 800, 3072, 768)  # kernel, operand, tokens, columns, depth
KEY = "NVIDIA H100, expand bfloat16 1024x3072x768 plain"
FOUND, SHIPPED = Tile(32, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2)


def test_the_rule_serves_what_nobody_measured(monkeypatch):
    on(monkeypatch, H100)
    assert tiles.choose(*LAUNCH) == tiles.rule("expand", H100, "bfloat16", 1024, 3072, 768)


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
        assert tiles.choose(*LAUNCH, strain) == tiles.rule(
            "expand", H100, "bfloat16", 1024, 3072, 768, strain
        )
    on(monkeypatch, CHIPS["A100"])
    assert tiles.choose(*LAUNCH) != SHIPPED


def timer(
    seconds: Callable[[Tile], float],
) -> tuple[Callable[[], object], Callable[[Callable[[], object]], float], list[Tile]]:
    """A launch, a clock by which it takes `seconds` of its tile, and the tiles it was launched with."""
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
    assert tiles.search(*LAUNCH[:2], launch, time, TRIED) == FOUND
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
    assert tiles.search(*LAUNCH[:2], launch, time, TRIED) == TRIED[2]
    assert seen == TRIED


def test_search_that_launches_nothing_leaves_everything_as_it_was(monkeypatch, tmp_path):
    on(monkeypatch, H100)
    before = tiles.choose(*LAUNCH)

    def seconds(tile: Tile) -> float:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    launch, time, _ = timer(seconds)
    with pytest.raises(RuntimeError, match="expand: no tile could be launched on NVIDIA H100"):
        tiles.search(*LAUNCH[:2], launch, time, TRIED)
    assert tiles.choose(*LAUNCH) == before
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_launch_ends_the_search_and_its_tile(monkeypatch):
    on(monkeypatch, H100)
    before = tiles.choose(*LAUNCH)

    def seconds(tile: Tile) -> float:
        raise ValueError("x has shape")

    launch, time, _ = timer(seconds)
    with pytest.raises(ValueError, match="x has shape"):
        tiles.search(*LAUNCH[:2], launch, time, TRIED)
    assert tiles.choose(*LAUNCH) == before


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("arithmetic", ITEMSIZE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_can_be_launched_and_hold_the_rules_tiles(chip, arithmetic, kernel):
    tried = tiles.candidates(kernel, CHIPS[chip], arithmetic)
    assert len(tried) == len(set(tried))
    assert all(tile.stages * stage_bytes(tile, arithmetic) <= CHIPS[chip].shared_memory for tile in tried)
    assert all(tile_rule.fits(kernel, CHIPS[chip], tile) for tile in tried)
    sizes = {(tile.rows, tile.columns) for tile in tried}
    for rows in (16, 1024, 1 << 17):
        tile = tiles.rule(kernel, CHIPS[chip], arithmetic, rows, 768, 768)
        assert (tile.rows, tile.columns) in sizes


def test_search_tries_the_candidates_unless_told_otherwise(monkeypatch):
    on(monkeypatch, H100)
    launch, time, seen = timer(lambda tile: float(area(tile)))
    tiles.search(*LAUNCH[:2], launch, time)
    tried = tiles.candidates("expand", H100, "bfloat16")
    assert any(tile.splits > 1 for tile in tried) and any(tile.described for tile in tried)
    assert seen == [tile._replace(splits=1, described=False) for tile in tried]  # all this launch can have
