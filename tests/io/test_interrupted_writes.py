"""What is left on disk when a write fails: the old file or the new one."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from two_models import assert_model, model

from mingle.io.files import CheckpointError, free_space, write_json
from mingle.io.safetensors import write_tensors


class Notifying(dict[str, torch.Tensor]):
    """A mapping that calls `notify` whenever the writer takes a tensor from it."""

    def __init__(self, tensors: dict[str, torch.Tensor], notify: Callable[[], None]) -> None:
        super().__init__(tensors)
        self.notify = notify

    def __getitem__(self, name: str) -> torch.Tensor:
        self.notify()
        return super().__getitem__(name)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A folder's only file, holding ones; whatever the test does, no other file may be left beside it."""
    path = tmp_path / "model.safetensors"
    write_tensors(path, model(1))
    yield path
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_full_disk_is_noticed_before_writing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    margin = 16 << 20
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=margin + 100)
    )
    free_space(old.parent, 100)
    with pytest.raises(
        CheckpointError, match=f"{old.parent}: disk full: 101 bytes .* {margin + 100} are free"
    ):
        free_space(old.parent, 101)
    size = old.stat().st_size
    with pytest.raises(CheckpointError, match=f"disk full: {size} bytes"):
        write_tensors(old, model(2))
    with pytest.raises(CheckpointError, match="disk full: 203 bytes"):
        write_json(old, "x" * 200)
    assert_model(old, 1)


def test_a_write_that_fails_half_way_leaves_the_old_file(old: Path) -> None:
    """The kernel refuses to let the file grow beyond 64 KiB, as it would on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(CheckpointError, match=f"{old}: .*{os.strerror(errno.EFBIG)}"):
            write_tensors(old, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_model(old, 1)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "absent")):
        write_tensors(tmp_path / "absent" / "x.safetensors", model(1))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()], ids=["OSError", "interrupt"]
)
@pytest.mark.parametrize(
    ("call", "number", "survivor"), [("fsync", 1, 1), ("replace", 1, 1), ("fsync", 2, 2)]
)
def test_a_failing_call_leaves_the_old_file_or_the_new(
    old: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, survivor: int, error: BaseException
) -> None:
    """Writing makes three calls that matter: sync the file, rename it, sync the folder."""
    calls: list[str] = []

    def failing(name: str) -> Callable[..., None]:
        original = getattr(os, name)

        def wrapper(*arguments: Any) -> None:
            calls.append(name)
            if name == call and calls.count(name) == number:
                raise error
            original(*arguments)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing("fsync"))
        patch.setattr(os, "replace", failing("replace"))
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            write_tensors(old, model(2))
    assert calls == ["fsync", "replace", "fsync"][: len(calls)] and calls[-1] == call
    assert isinstance(error, KeyboardInterrupt) or f"{old}: " in str(caught.value)
    assert_model(old, survivor)


def test_all_bytes_are_with_the_kernel_when_the_file_is_synced(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    write_tensors(old, model(2))
    assert sizes[0] == old.stat().st_size


def test_an_error_while_taking_tensors_leaves_the_old_file(old: Path) -> None:
    taken: list[None] = []

    def fail_once_writing() -> None:
        taken.append(None)
        if any(name.startswith(".mingle-tmp-") for name in os.listdir(old.parent)):
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        write_tensors(old, Notifying(model(2), fail_once_writing))
    assert len(taken) > len(model(2))
    assert_model(old, 1)
