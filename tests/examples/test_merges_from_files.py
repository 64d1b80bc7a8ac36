"""The comparison with mergekit on files: its models, what it counts of a process, and whom it refuses."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import merge_commands
import merges_from_files
import pytest
import random_llamas
import swept
import torch
from merge_commands import MERGEKIT, OURS_TWICE, FilesProblem
from random_llamas import DENSITY, SIZES, Size

from mingle.bench import record
from mingle.bench.judge import by_name
from mingle.bench.measure import OURS, Unavailable
from mingle.io.safetensors import CheckpointReader
from mingle.methods.ties import trim_threshold

MEASURED = Path(__file__).parents[2] / "bench" / "results"
TINY = Size(64, 2, 96, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and eight models, and its tokens but 40 left out."""
    place = tmp_path_factory.mktemp("llamas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_llamas, "_TOKENS", 40)
        random_llamas.write(place / "base", TINY, shard_bytes=20_000)
        for i in range(8):
            random_llamas.write(place / str(i), TINY, i, shard_bytes=30_000)
    return place


def test_models_are_those_that_transformers_makes_of_the_configuration(folders):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.bfloat16)
    reader = CheckpointReader(folders / "base")
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        n: reader.shape(n) for n in reader
    }
    assert len(list((folders / "base").glob("*.safetensors"))) > 4
    assert all(model.state_dict()[name].equal(reader.tensor(name)) for name in reader)


def test_sizes_are_those_of_their_names():
    for name, size in SIZES.items():
        said = name.split()[0]
        assert f"{size.parameters() / 1e9:.{len(said.partition('.')[2])}f}" == said


def test_trimming_by_tensor_and_of_all_keeps_the_same_entries(folders):
    base = CheckpointReader(folders / "base")
    large = []
    for i in range(8):
        tuned = CheckpointReader(folders / str(i))
        changes = {name: tuned.tensor(name).float() - base.tensor(name).float() for name in base}
        threshold = trim_threshold(changes, DENSITY)
        kept = {name: change.abs() >= threshold for name, change in changes.items()}
        assert all(int(one.sum()) == int(DENSITY * one.numel()) for one in kept.values())
        large.append(torch.cat([change[kept[name]].abs() for name, change in changes.items()]))
    for lower, upper in pairwise(large):  # so that no two cancel
        assert lower.max() < upper.min()


def test_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    held = torch.ones(1 << 27)  # 512 MB
    small = merge_commands.took([sys.executable, "-c", "import time; time.sleep(0.1)"])
    large = merge_commands.took(
        [sys.executable, "-c", "x = b'1' * (200 << 20); import time; time.sleep(0.2)"]
    )
    assert held.sum() > 0 and small["peak_bytes"] < 60e6
    for key in ("peak_bytes", "anonymous_bytes"):
        assert 190e6 < large[key] - small[key] < 230e6
    assert small["wall_seconds"] > 0.1 and small["cpu_seconds"] < small["wall_seconds"] + 0.1


def test_of_several_processes_the_largest_counts():
    inner = "x = b'1' * (200 << 20); import time; time.sleep(0.3)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    found = merge_commands.took([sys.executable, "-c", code])
    for key in ("peak_bytes", "anonymous_bytes"):
        assert 200e6 < found[key] < 260e6


def test_a_command_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such thing"):
        merge_commands.took([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_without_mergekit_it_is_said_what_is_missing(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEKIT_YAML", "mergekit-that-is-not-there")
    with pytest.raises(Unavailable, match="mergekit-yaml cannot be found"):
        merge_commands.command(
            MERGEKIT, FilesProblem("ties", folders / "base", [folders / "0"]), tmp_path / "out"
        )
    assert merge_commands.mergekit_version() is None


@pytest.mark.parametrize(
    "path", [MEASURED / f"cpu/e2e/{name}.json" for name in ("growth", "files")], ids=lambda path: path.stem
)
def test_committed_curves_are_drawn(path, tmp_path):
    found = record.read(path)
    swept.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


#: does what mergekit does with the same file, or with a fault
_STAND_IN = """#!{python}
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file

def tensors(folder):
    files = map(load_file, sorted(Path(folder).glob("*.safetensors")))
    return {{name: tensor.float() for file in files for name, tensor in file.items()}}

about = json.loads(Path(sys.argv[1]).read_text())
base, models = tensors(about["base_model"]), [tensors(one["model"]) for one in about["models"]]
weight, out = about["parameters"]["weight"] * {fault}, Path(sys.argv[2])
out.mkdir(parents=True)
merged = {{name: t + sum(weight * (one[name] - t) for one in models) for name, t in base.items()}}
save_file(merged, out / "model.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [1.0, 1.01])
def test_weights_are_compared_before_times_are(folders, tmp_path, monkeypatch, capsys, fault):
    program = tmp_path / "mergekit-yaml"
    program.write_text(_STAND_IN.format(python=sys.executable, fault=fault))
    program.chmod(0o755)
    monkeypatch.setenv("MERGEKIT_YAML", str(program))
    monkeypatch.setattr(random_llamas, "_TOKENS", 40)
    monkeypatch.setitem(SIZES, "0.06 B", TINY)
    only = {"task-arithmetic": ((OURS, OURS_TWICE, MERGEKIT), ("0.06 B",))}
    monkeypatch.setattr(merges_from_files, "_SWEEPS", only)
    assert merges_from_files.main(["--quick", "--rounds", "1", "--out", str(tmp_path)]) == (fault != 1.0)
    (case,) = record.read(tmp_path / "files.json")["cases"]
    rows = by_name(case)
    assert rows[OURS]["status"] == "ok" and rows[OURS]["written_bytes"] > 0
    assert rows[OURS_TWICE]["status"] == "ok" and rows[OURS_TWICE]["errors"] == {"weights": 0.0}
    assert rows[MERGEKIT]["status"] == ("ok" if fault == 1.0 else "wrong")
    assert ("median" in rows[MERGEKIT]) == (fault == 1.0)
    assert "| task-arithmetic: 10⁹ parameters | mingle |" in (tmp_path / "files.md").read_text()
    assert (tmp_path / "files.png").stat().st_size > 10_000
    assert "weights is off by" in capsys.readouterr().out or fault == 1.0
