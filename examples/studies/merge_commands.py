"""Merges from files as commands, ours and mergekit's: what a process took, and whether both agree."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_llamas import DENSITY
from torch import Tensor

from mingle.bench.measure import OURS, Row, need, verdict
from mingle.io.files import write_json
from mingle.io.journal import PartFiles
from mingle.io.manifest import entries_of, read_manifest
from mingle.io.safetensors import CheckpointReader

MERGEKIT, MERGEKIT_BF16, OURS_TWICE = "mergekit", "mergekit bf16", "mingle in 2 processes"
NOTES = {
    OURS: "mingle merge: model after model, each saved with its hash; weights in fp32",
    OURS_TWICE: "the same under torchrun; CPU time of all processes, memory of the largest one",
    MERGEKIT: "mergekit-yaml, dtype float32: all models at once, written once; weights in fp32",
    MERGEKIT_BF16: "mergekit-yaml, dtype bfloat16: computed and written in bf16",
}
#: method → our options; mergekit's name for it, and what its file says of all models
METHODS: dict[str, dict[str, float]] = {
    "average": {},
    "task-arithmetic": {"scaling": 0.3},
    "ties": {"scaling": 1.0, "density": DENSITY},
    "opcm": {},
    "mingle": {"rank": 16, "steps": 0},
}
_THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "task-arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 1.0, "density": DENSITY, "normalize": False}),
}
#: ‖error‖ of all tensors over ‖θ − θ₀‖
TOLERANCES = {MERGEKIT: 1e-5, MERGEKIT_BF16: 5e-2, OURS_TWICE: 0.0}
#: run in a process of its own, as a new process's peak begins with that of the one that started it
_LAUNCH = """
import json, os, sys, time
def anonymous(process):
    try:
        with open(f"/proc/{process}/status") as file:
            sizes = dict(line.partition(":")[::2] for line in file)
        with open(f"/proc/{process}/task/{process}/children") as file:
            children = file.read().split()
    except OSError:  # it has just ended
        return 0
    return max(int(sizes.get("RssAnon", "0").split()[0]), *map(anonymous, children), 0)

began, most = time.perf_counter(), 0
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
    most = max(most, anonymous(child))
    time.sleep(0.02)
wall = time.perf_counter() - began
with open(f"/proc/{child}/io") as file:
    moved = {key: int(size) for key, size in (line.split(":") for line in file)}
_, status, used = os.wait4(child, 0)
found = dict(wall_seconds=wall, cpu_seconds=used.ru_utime + used.ru_stime)
found |= dict(peak_bytes=used.ru_maxrss * 1024, anonymous_bytes=most * 1024)
found |= dict(read_bytes=moved["rchar"], written_bytes=moved["wchar"])
print("took", json.dumps(found | dict(status=os.waitstatus_to_exitcode(status))))
"""


@dataclass(frozen=True)
class FilesProblem:
    """A method, the base's folder, and those of the fine-tuned models."""

    method: str
    base: Path
    models: Sequence[Path]


def took(command: Sequence[str]) -> Row:
    """Run a command: seconds, of the clock and of processors; bytes at the peak, with and without pages of
    mapped files; bytes read and written by calls, as which access to mapped files does not count.

    Of several processes it is the memory of the largest, and the sum of all else.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCH, *command]
    run = subprocess.run(launched, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _, told = run.stdout.rpartition("took ")
    found: Row = json.loads(told) if run.returncode == 0 else {"status": run.returncode}
    if found.pop("status"):
        raise RuntimeError(f"{' '.join(command)}: {(said or run.stdout)[-500:]}")
    return found


def reading_rate(folder: Path) -> float:
    """Bytes per second at which the disk reads a folder's files, which are dropped from memory before."""
    size, seconds = 0, 0.0
    for path in sorted(folder.iterdir()):
        with path.open("r+b", buffering=0) as file:
            os.fsync(file)  # only what is on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while piece := file.read(16 << 20):
                size += len(piece)
            seconds += time.perf_counter() - began
    return size / seconds


def command(name: str, problem: FilesProblem, out: Path) -> list[str]:
    """The command of a contender, its file written beside `out`.

    Raises:
        Unavailable: mergekit is not installed, or lacks the method.
    """
    file, folders = out.with_suffix(".yaml"), [str(model) for model in problem.models]
    if name in (OURS, OURS_TWICE):
        experts = [{"name": f"task{i}", "model": folder} for i, folder in enumerate(folders)]
        about = {"base": str(problem.base), "method": problem.method, "keep": 1, "experts": experts}
        write_json(file, about | {"options": METHODS[problem.method]})
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launched = [sys.executable, *(several if name == OURS_TWICE else [])]
        return [*launched, "-m", "mingle", "merge", str(file), "--out", str(out)]
    need(
        mergekit() is not None, "mergekit-yaml cannot be found; install mergekit in an environment of its own"
    )
    method, settings = _THEIRS[problem.method]
    dtype = "float32" if name == MERGEKIT else "bfloat16"
    about = {"merge_method": method, "base_model": str(problem.base), "dtype": dtype, "parameters": settings}
    write_json(file, about | {"models": [{"model": folder} for folder in folders]})
    return [str(mergekit()), str(file), str(out), "--no-copy-tokenizer", "--quiet"]


def mergekit() -> str | None:
    """The program; ``MERGEKIT_YAML`` names one that is not on the path."""
    return shutil.which(os.environ.get("MERGEKIT_YAML", "mergekit-yaml"))


def mergekit_version() -> str | None:
    """By the Python beside the program."""
    program = mergekit()
    if program is None or not (python := Path(program).with_name("python")).exists():
        return None
    code = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() or None


def agreement(name: str, problem: FilesProblem, ours: Path, theirs: Path) -> Row:
    """Status and error of another contender's weights against ours.

    Of TIES ours after two models is θ₁ + TIES(Δ₁, Δ₂), and mergekit's θ₀ + TIES(Δ₁, Δ₂): what is compared is
    TIES(Δ₁, Δ₂).  After more models both differ by definition, and mergekit's is a bound of something else.
    """
    if name == OURS_TWICE:
        return verdict({"weights": _difference(ours, theirs)}, TOLERANCES[name])
    if problem.method == "ties" and len(problem.models) != 2:
        return {"status": "bound", "errors": None}
    wrong, size = 0.0, 0.0
    for merged, found, base, first in _tensors(problem, ours, theirs):
        change = merged - (first if problem.method == "ties" else base)
        wrong += float((found - base - change).square().sum())
        size += float(change.square().sum())
    return verdict({"weights": math.sqrt(wrong / size)}, TOLERANCES[name])


def _merged(folder: Path) -> Mapping[str, Tensor]:
    return PartFiles(folder, entries_of(read_manifest(folder)["state"]))


def _difference(ours: Path, others: Path) -> float:
    """The largest one between two merges of ours."""
    first, second = _merged(ours), _merged(others)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def _tensors(problem: FilesProblem, ours: Path, theirs: Path) -> Iterator[tuple[Tensor, ...]]:
    """Ours, theirs, the base's and the first model's, in fp64, one after another."""
    merged = _merged(ours)
    found, base, first = map(CheckpointReader, (theirs, problem.base, problem.models[0]))
    for name in base:
        tensors = merged[f"merged/{name}"], found.tensor(name), base.tensor(name), first.tensor(name)
        yield tuple(tensor.double() for tensor in tensors)
