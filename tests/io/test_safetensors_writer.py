"""What the writers put on disk, and what is left there when they fail."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mingle.io.files import CheckpointError, free_space, read_json, sha256, write_copy, write_json
from mingle.io.safetensors import CheckpointReader, write_tensors

DTYPES = [
    *(
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
    ),
    *(
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
    ),
]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)


def model(value: float, names: str = "abcd") -> dict[str, torch.Tensor]:
    return {name: torch.full((3, 5), value) for name in names}


def assert_model(path: Path, value: float) -> None:
    for tensor in CheckpointReader(path).state_dict().values():
        assert torch.equal(tensor, torch.full((3, 5), value))


class Notifying(dict[str, torch.Tensor]):
    """A mapping that calls `notify` whenever the writer takes a tensor from it."""

    def __init__(self, tensors: dict[str, torch.Tensor], notify: Callable[[], None]) -> None:
        super().__init__(tensors)
        self.notify = notify

    def __getitem__(self, name: str) -> torch.Tensor:
        self.notify()
        return super().__getitem__(name)


# Content


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "matrix": values(dtype, 3, 5),
        "scalar": values(dtype),
        "empty": values(dtype, 0, 3),
        "byte": torch.ones(1).byte(),
    }
    write_tensors(path, tensors)
    reader = CheckpointReader(path)
    foreign = load_file(path)
    assert reader.keys() == sorted(tensors) == sorted(foreign)
    for name, tensor in tensors.items():
        for read in (reader.tensor(name), foreign[name]):
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert read.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    base = torch.arange(24.0).reshape(4, 6).requires_grad_()
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": torch.ones(1, 1).expand(3, 4),
        "shared": base,
        "conjugated": torch.complex(torch.ones(3), torch.ones(3)).conj(),
        "negated": torch._neg_view(torch.ones(3)),
    }
    write_tensors(path, tensors)
    for name, tensor in CheckpointReader(path).state_dict().items():
        assert torch.equal(tensor, tensors[name].detach()), name


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    assert CheckpointReader(tmp_path / "x.safetensors").keys() == []


def test_equal_content_gives_equal_bytes_and_their_hash(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": values(dtype, number) for number, dtype in enumerate(DTYPES)}
    metadata = {f"key {number}": "ü" for number in range(20)}
    first, second = tmp_path / "first", tmp_path / "second"
    digest = write_tensors(first, tensors, metadata)
    assert digest == write_tensors(second, dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert digest == sha256(first) == sha256(second)
    assert first.read_bytes() == second.read_bytes()
    assert digest != write_tensors(second, tensors, metadata | {"key 0": "u"})
    assert digest != write_tensors(second, tensors | {"layer.1": torch.tensor([False])}, metadata)


def test_sha256_of_known_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(CheckpointError, match="absent"):
        sha256(tmp_path / "absent")


def test_metadata_and_its_default(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for given, expected in [
        (None, {"format": "pt"}),
        ({"a": "1"}, {"a": "1", "format": "pt"}),
        ({"format": "np"}, {"format": "np"}),
    ]:
        write_tensors(path, model(1), given)
        with safe_open(path, "pt") as file:
            assert file.metadata() == expected
    with pytest.raises(CheckpointError, match="metadata must map strings"):
        write_tensors(path, model(2), {"steps": 3})  # type: ignore[dict-item]
    assert_model(path, 1)


def test_tensors_start_at_multiples_of_their_item_size(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"{number}": values(dtype, 3) for number, dtype in enumerate(DTYPES)}
    write_tensors(path, tensors)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert all(
        (start + header[name]["data_offsets"][0]) % tensor.element_size() == 0
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)], ids=oct)
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "x.safetensors", model(1))
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


UNWRITABLE = {
    "sparse": ("w", torch.eye(2).to_sparse()),
    "meta": ("w", torch.empty(2, device="meta")),
    "complex128": ("w", torch.ones(2, dtype=torch.complex128)),
    "reserved name": ("__metadata__", torch.ones(2)),
}


@pytest.mark.parametrize(("name", "tensor"), UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_a_tensor_without_a_safetensors_form_is_named(
    tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, model(1))
    with pytest.raises(CheckpointError, match=f"{path}: tensor '{name}' has no safetensors form"):
        write_tensors(path, {name: tensor})
    assert_model(path, 1)
    assert os.listdir(tmp_path) == ["x.safetensors"]


# JSON


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [1, 2.5, None, True], "a": {"é": "\n"}}
    write_json(path, value)
    assert read_json(path) == value
    assert (
        path.read_text()
        == '{\n  "a": {\n    "é": "\\n"\n  },\n  "b": [\n    1,\n    2.5,\n    null,\n    true\n  ]\n}\n'
    )


def test_json_without_a_json_form_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1)
    for value in (float("nan"), [float("inf")], "\ud800"):
        with pytest.raises(CheckpointError, match=f"{path}: not written"):
            write_json(path, value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["x.json"]


BAD_JSON = {
    "syntax": (b'{\n "a": 1,\n "b" 2}', "line 3, column 6"),
    "duplicate": (b'{"a": 1, "b": {"c": 1, "c": 1}}', "duplicate key 'c'"),
    "not UTF-8": (b'"\xff"', "utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "empty": (b"", "line 1, column 1"),
    "two values": (b"1\n2", "line 2, column 1"),
    "nested too deep": (b"[" * 200_000, "recursion"),
}


@pytest.mark.parametrize(("data", "part"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_named(tmp_path: Path, data: bytes, part: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path}: bad JSON: .*{part}"):
        read_json(path)


def test_json_size_is_capped(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('"12345678"')
    assert read_json(path, max_bytes=10) == "12345678"
    with pytest.raises(CheckpointError, match=f"{path}: expected at most 9 bytes of JSON, found 10"):
        read_json(path, max_bytes=9)
    with pytest.raises(CheckpointError, match="absent"):
        read_json(tmp_path / "absent")


def test_a_copy_has_the_same_bytes_and_replaces_the_old_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", model(1))
    (tmp_path / "link").symlink_to("source")
    write_json(tmp_path / "target", 0)
    write_copy(tmp_path / "link", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert not (tmp_path / "target").is_symlink()
    with pytest.raises(CheckpointError, match="absent"):
        write_copy(tmp_path / "absent", tmp_path / "target")
    assert_model(tmp_path / "target", 1)
    assert sorted(os.listdir(tmp_path)) == ["link", "source", "target"]


# Failures


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
