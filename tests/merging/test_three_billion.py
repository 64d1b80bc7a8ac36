"""Commands merge Llamas of three thousand million parameters, 6 GB each, in 2.5 GB of memory."""

from __future__ import annotations

import shutil

import merge_commands
import pytest
import random_llamas
from merge_commands import FilesProblem
from random_llamas import SIZES, Size

from mingle.bench.measure import OURS
from mingle.io.journal import PartFiles
from mingle.io.manifest import entries_of, read_manifest
from mingle.io.safetensors import CheckpointReader

pytestmark = pytest.mark.large

#: bytes at a process's peak; of the disk, three models and the base beside two generations of a merge
LIMIT, DISK = 2.5e9, 65e9
EMBEDDING, LAST = "model.embed_tokens.weight", "model.norm.weight"


def problem_of(place, size, models, method="average"):
    if shutil.disk_usage(place).free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk")
    base = random_llamas.write(place / "base", size)
    return FilesProblem(method, base, [random_llamas.write(place / f"{i}", size, i) for i in range(models)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("three-billion")
    yield problem_of(place, SIZES["3.0 B"], 3)
    shutil.rmtree(place)


def took(problem, out):
    found = merge_commands.took(merge_commands.command(OURS, problem, out))
    print(problem.method, found)
    return found


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties"])
def test_a_merge_of_three_models_takes_little_memory(whole, method, tmp_path):
    problem = FilesProblem(method, whole.base, whole.models)
    found = took(problem, tmp_path / "merged")
    merged = PartFiles(tmp_path / "merged", entries_of(read_manifest(tmp_path / "merged")["state"]))
    base, *models = map(CheckpointReader, (problem.base, *problem.models))
    for name in (EMBEDDING, LAST):
        before, tuned = base.tensor(name).float(), [model.tensor(name).float() for model in models]
        expected = before
        for i, one in enumerate(tuned):
            change = one - before
            if method == "average":
                expected = before if i == 0 else expected
                expected = expected + (one - expected) / (i + 1)
            elif method == "task-arithmetic":
                expected = expected + 0.3 * change
        if method != "ties":
            assert (merged[f"merged/{name}"] - expected).abs().max() < 1e-7
        else:
            assert (merged[f"merged/{name}"] - before).abs().max() < 0.1
    shutil.rmtree(tmp_path / "merged")
    assert found["peak_bytes"] <= LIMIT


def test_opcm_takes_little_memory(tmp_path):
    """Of one block: with more blocks decompositions take more time, and no more memory."""
    width = SIZES["3.0 B"]
    problem = problem_of(tmp_path, Size(width.width, 1, width.inner, width.kv_heads), 2, "opcm")
    assert took(problem, tmp_path / "merged")["peak_bytes"] <= LIMIT
    for folder in (problem.base, *problem.models, tmp_path / "merged"):
        shutil.rmtree(folder)
