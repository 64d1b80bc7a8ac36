"""Commands merge Llamas of three thousand million parameters, 6 GB each, in 2.5 GB of memory."""

from __future__ import annotations

import shutil

import merge_commands
import pytest
import random_llamas
from merge_commands import METHODS, OURS_TWICE, FilesProblem
from random_llamas import SIZES, Size

from mingle.bench.measure import OURS
from mingle.io.journal import PartFiles
from mingle.io.manifest import entries_of, read_manifest
from mingle.io.safetensors import CheckpointReader

pytestmark = pytest.mark.large

#: bytes at a process's peak; of the disk, the base and three models beside two generations of a merge
LIMIT, DISK = 2.5e9, 58e9


@pytest.fixture
def place(tmp_path):
    """A folder that does not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models."""
    folder = tmp_path_factory.mktemp("three-billion")
    if shutil.disk_usage(folder).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk")
    try:
        yield written(folder, SIZES["3.0 B"], 3)
    finally:
        shutil.rmtree(folder)


def written(folder, size, count):
    base = random_llamas.write(folder / "base", size)
    return base, [random_llamas.write(folder / f"{i}", size, i) for i in range(count)]


def peak_of(problem, out, name=OURS):
    found = merge_commands.took(merge_commands.command(name, problem, out))
    print(problem.method, found)  # for `pytest -s`
    return found["peak_bytes"]


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_a_merge_of_three_models_takes_little_memory(models, method, place):
    """In each of two processes, as in one: a whole merge by one of them takes twice the time."""
    peak = peak_of(FilesProblem(method, *models), place / "merged", OURS_TWICE)
    merged = PartFiles(place / "merged", entries_of(read_manifest(place / "merged")["state"]))
    readers = [CheckpointReader(folder) for folder in (models[0], *models[1])]
    assert len(merged) == len(readers[0])
    for name in ("model.embed_tokens.weight", "model.norm.weight") if method == "task-arithmetic" else ():
        base, *tuned = (reader.tensor(name).float() for reader in readers)
        expected = base + METHODS[method]["scaling"] * sum(one - base for one in tuned)
        assert (merged[f"merged/{name}"] - expected).abs().max() < 1e-7
    assert peak <= LIMIT


@pytest.fixture
def one_block(place):
    """A base and two models of one block: more blocks take more time, as every matrix is decomposed, and no
    more memory."""
    size = SIZES["3.0 B"]
    return written(place, Size(size.width, 1, size.inner, size.kv_heads), 2)


def test_opcm_takes_little_memory(one_block, place):
    assert peak_of(FilesProblem("opcm", *one_block), place / "merged") <= LIMIT


def test_experts_take_little_memory(one_block, place):
    peak = peak_of(FilesProblem("mingle", *one_block), place / "merged")
    for task in read_manifest(place / "merged")["tasks"]:
        files = PartFiles(place / "merged", entries_of(task["tensors"]))
        factors = [files.described(name) for name in files if name.endswith(".A")]
        assert len(factors) == 7 and all(factor.shape[0] == 16 for factor in factors)
    assert peak <= LIMIT
