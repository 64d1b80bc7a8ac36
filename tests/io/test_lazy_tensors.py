"""Tensors of which only rows are in memory, against the same ones in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mingle.io import lazy_tensors
from mingle.io.files import CheckpointError
from mingle.io.journal import PartFiles
from mingle.io.lazy_tensors import Joined, blocks_of, chosen, row_blocks
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.state_dicts import non_finite, state_hash

SHAPES = {"matrix": (7, 5), "long": (23,), "packed": (3, 2, 4), "number": (), "none": (0, 4), "wide": (2, 30)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 10)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    made = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return made | {"half": torch.randn(9, 3).bfloat16()}


@pytest.fixture
def files(tensors, tmp_path):
    write_tensors(tmp_path / "a.safetensors", {name: tensors[name] for name in list(tensors)[:3]})
    write_tensors(tmp_path / "b.safetensors", {name: tensors[name] for name in list(tensors)[3:]})
    return PartFiles(tmp_path, [{"file": "a.safetensors"}, {"file": "b.safetensors"}])


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_are_all_rows_in_their_order(tensors, name):
    tensor = tensors[name]
    blocks = [tensor[rows] for rows in row_blocks(tensor)]
    assert torch.cat(blocks).equal(tensor) if tensor.dim() else blocks[0].equal(tensor)
    assert all(block.numel() <= 10 or len(block) == 1 or len(blocks) == 1 for block in blocks)
    assert (len(blocks) > 1) == (tensor.numel() > 10)


def test_lazy_tensors_have_the_hash_and_the_file_of_those_in_memory(tensors, files, tmp_path):
    assert {name: len(list(blocks_of(files, name))) for name in ("matrix", "half", "number")} == {
        "matrix": 4,
        "half": 3,
        "number": 1,
    }
    assert state_hash(files) == state_hash(tensors)
    assert write_tensors(tmp_path / "lazy", files) == write_tensors(tmp_path / "whole", tensors)
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_of_a_file_no_more_is_read_than_the_rows(tensors, tmp_path, monkeypatch):
    large = torch.arange(60000.0).view(6000, 10)
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors | {"large": large})
    reader = CheckpointReader(path)
    before = _read_so_far()
    assert reader.tensor("large", slice(5000, 5010)).equal(large[5000:5010])
    assert _read_so_far() - before < large.nbytes / 10
    write_tensors(path, tensors | {"large": large + 1})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: was replaced or truncated while it was read"):
        reader.tensor("large", slice(0, 3))


def _read_so_far():
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_of_mappings_that_are_joined_the_last_counts(tensors, files):
    joined = Joined(files, {"half": torch.ones(2, 3), "new": torch.zeros(4)})
    assert set(joined) == {*tensors, "new"} and "new" in joined and "old" not in joined
    assert joined["half"].equal(torch.ones(2, 3)) and joined.described("matrix").shape == (7, 5)
    assert joined.rows("long", slice(3, 5)).equal(tensors["long"][3:5])
    some = chosen(joined, ["long", "new"])
    assert list(some) == ["long", "new"] and isinstance(some, Joined)
    assert list(chosen(tensors, ["half"])) == ["half"]


def test_what_is_not_finite_is_found_in_any_block(tensors, tmp_path):
    for name, places in (("matrix", [(5, 2), (6, 0)]), ("half", [(8, 2)]), ("packed", [(2, 1, 3)])):
        for place in places:
            tensors[name][place] = torch.nan
        reason = f"{len(places)} of {tensors[name].numel()} values are not finite, the first at {places[0]}"
        assert non_finite(tensors[name]) == reason
    write_tensors(tmp_path / "a.safetensors", tensors)
    reader = CheckpointReader(tmp_path / "a.safetensors")
    assert reader.tensor("matrix", slice(0, 2)).equal(tensors["matrix"][:2])
    with pytest.raises(
        CheckpointError, match=r"'matrix': 2 of 35 values are not finite, the first at \(5, 2\)"
    ):
        reader.tensor("matrix", slice(4, 6))
    large = torch.full((3, 5), 1e30)
    assert non_finite(large) == "" and non_finite(large, torch.float16).startswith("15 of 15 values")
