"""Writers that are killed: the old model is on disk afterwards, or the new one."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Ready, fork, kill

from mingle.io.files import clean_stale
from mingle.io.safetensors import CheckpointReader, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
NAMES = "abcd"


def model(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((3, 5), value) for name in NAMES}


def written(path: Path) -> float:
    """The value that all of the model in `path` has."""
    tensors = CheckpointReader(path).state_dict()
    assert sorted(tensors) == sorted(NAMES)
    (value,) = set(torch.cat([tensor.flatten() for tensor in tensors.values()]).tolist())
    return float(value)


class Stepping(dict[str, torch.Tensor]):
    """A mapping that calls `step` whenever the writer takes a tensor from it."""

    step: Callable[[], None]

    def __getitem__(self, name: str) -> torch.Tensor:
        self.step()
        return super().__getitem__(name)


def write_until_killed(path: Path, value: float, steps: int) -> None:
    """Write, but die of SIGKILL after that many steps: tensors taken, and the begin and end of each sync and
    rename.
    """
    remaining = itertools.count(steps, -1)

    def step() -> None:
        if next(remaining) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def stepping(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: Any) -> None:
            step()
            original(*arguments)
            step()

        return wrapper

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", stepping(os.fsync))
    patch.setattr(os, "replace", stepping(os.replace))
    tensors = Stepping(model(value))
    tensors.step = step
    write_tensors(path, tensors)


def test_kill_at_every_step_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, model(1))
    survivors, stale = [], []
    for steps in itertools.count():

        def task(ready: Ready, steps: int = steps) -> None:
            write_until_killed(path, 2, steps)

        status = os.waitpid(fork(task), 0)[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        survivors.append(written(path))
        stale.append(len(clean_stale(tmp_path)))
        assert os.listdir(tmp_path) == [path.name]
    # The last three steps follow the rename. Seven lie between the creation of the temporary file and the
    # rename: four tensors taken, the file's sync begun and ended, the rename begun.
    assert survivors == [1] * (len(survivors) - 3) + [2] * 3
    assert stale == [0] * (len(stale) - 10) + [1] * 7 + [0] * 3


def test_kill_at_random_moments_leaves_one_of_the_two_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def write_in_turns(ready: Ready) -> None:
        for value in itertools.cycle([1, 2]):
            write_tensors(path, model(value))
            ready()

    chance = random.Random(0)
    for _ in range(25):
        pid = fork(write_in_turns)
        time.sleep(chance.uniform(0, 0.02))
        kill(pid)
        assert written(path) in (1, 2)
        assert len(clean_stale(tmp_path)) <= 1
        assert os.listdir(tmp_path) == [path.name]


def test_only_our_temporary_files_are_stale(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ours = tmp_path / ".mingle-tmp-123-0123456789abcdef-model.safetensors"
    others = [
        ".lock",
        ".mingle-tmp",
        ".mingle-tmp-x-0123456789abcdef-m",
        ".mingle-tmp-1-0123-m",
        ours.name[1:],
        "model.safetensors",
    ]
    for name in (ours.name, *others):
        (tmp_path / name).write_bytes(b"")
    folder = tmp_path / ".mingle-tmp-123-0123456789abcdef-folder"
    folder.mkdir()
    (folder / ours.name).write_bytes(b"")
    outside = tmp_path_factory.mktemp("outside") / ours.name
    outside.write_bytes(b"")
    (tmp_path / "linked").symlink_to(outside.parent)
    assert clean_stale(tmp_path) == sorted([ours, folder / ours.name])
    assert sorted(os.listdir(tmp_path)) == sorted([*others, folder.name, "linked"])
    assert outside.exists() and clean_stale(tmp_path) == []
