"""Writers that are killed and writers that meet: what is on disk afterwards, and who holds a folder's lock."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from mingle.io.files import CheckpointError, clean_stale, lock
from mingle.io.safetensors import CheckpointReader, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Ready = Callable[[], object]
NAMES = "abcd"


def fork(task: Callable[[Ready], object]) -> int:
    """Start `task` in a child process; return its pid once the task has called its argument, or has ended.

    The child exits with 0 when the task returns and 1 when it raises; an alarm ends it if the test does not.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            task(lambda: os.write(writing, b"!"))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def model(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((3, 5), value) for name in NAMES}


def written(path: Path) -> float:
    """The value that all of the model in `path` has."""
    tensors = CheckpointReader(path).state_dict()
    assert sorted(tensors) == sorted(NAMES)
    (value,) = set(torch.cat([tensor.flatten() for tensor in tensors.values()]).tolist())
    return float(value)


# Kills


class Stepping(dict[str, torch.Tensor]):
    """A mapping that calls `step` whenever the writer takes a tensor from it."""

    step: Callable[[], None]

    def __getitem__(self, name: str) -> torch.Tensor:
        self.step()
        return super().__getitem__(name)


def write_until_killed(path: Path, value: float, steps: int) -> None:
    """Write, but die of SIGKILL after so many steps: tensors taken, and the begin and end of each sync and
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


# Locks


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The pid of another process, which holds the lock of `tmp_path` until it is killed."""

    def hold(ready: Ready) -> None:
        with lock(tmp_path):
            ready()
            signal.pause()

    pid = fork(hold)
    yield pid
    if os.waitpid(pid, os.WNOHANG) == (0, 0):
        kill(pid)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught, lock(folder):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_with_the_holder(tmp_path: Path, holder: int) -> None:
    folder, who = refusal(tmp_path).split(": being written by ")
    assert folder == str(tmp_path)
    assert who.startswith(f"pid {holder} on {socket.gethostname()} since ")
    age = datetime.now(UTC) - datetime.fromisoformat(who.split(" since ")[1])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_a_killed_holder_does_not_block(tmp_path: Path, holder: int) -> None:
    refusal(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    with lock(tmp_path):
        assert f"pid {os.getpid()} " in refusal(tmp_path)


def test_the_record_of_an_earlier_holder_does_not_show_through(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "' + "x" * 500 + '", "since": "long ago"}')
    with lock(tmp_path):
        assert f"pid {os.getpid()} on {socket.gethostname()} since 20" in refusal(tmp_path)


@pytest.mark.parametrize("record", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_signed_is_another_process(tmp_path: Path, record: str) -> None:
    with lock(tmp_path):
        (tmp_path / ".lock").write_text(record)
        assert refusal(tmp_path) == f"{tmp_path}: being written by another process"


def test_an_exception_passes_unchanged_and_releases(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="of the caller"), lock(tmp_path):
            raise OSError("of the caller")


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    def linger(ready: Ready) -> None:
        ready()
        signal.pause()

    with lock(tmp_path):
        pid = fork(linger)
    try:
        with lock(tmp_path):
            pass
    finally:
        kill(pid)


def test_folders_have_locks_of_their_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with lock(tmp_path / "a"), lock(tmp_path / "b"):
        assert "being written" in refusal(tmp_path / "a") and "being written" in refusal(tmp_path / "b")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent" in refusal(tmp_path / "absent")
