"""Writers that meet: who holds a folder's lock."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from forks import Ready, fork, kill

from mingle.io.files import CheckpointError
from mingle.io.locks import lock

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


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
    folder, _, rest = refusal(tmp_path).partition(": being written by ")
    who, _, advice = rest.partition("; ")
    assert advice == "wait until that has ended, or end it: what it saved is kept"
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
        assert refusal(tmp_path).startswith(f"{tmp_path}: being written by another process; wait")


def test_an_exception_passes_unchanged_and_releases(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="of the caller"), lock(tmp_path):
            raise OSError("of the caller")


def test_nothing_of_a_lock_stays_behind(tmp_path: Path) -> None:
    with lock(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
    assert not os.listdir(tmp_path)


def test_whoever_waited_for_a_lock_that_went_takes_a_new_one(tmp_path: Path) -> None:
    """A waiting process has opened the file that the holder removes; no two may hold different files."""

    def count(ready: Ready) -> None:
        ready()
        for _ in range(200):
            with lock(tmp_path, wait=True):
                (tmp_path / "held").touch(exist_ok=False)
                (tmp_path / "held").unlink()
        (tmp_path / f"done-{os.getpid()}").touch()

    pids = [fork(count) for _ in range(3)]
    for pid in pids:
        os.waitpid(pid, 0)
    assert sorted(os.listdir(tmp_path)) == sorted(f"done-{pid}" for pid in pids)


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
