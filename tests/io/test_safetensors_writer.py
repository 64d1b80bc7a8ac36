"""What the writer of safetensors files puts on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from two_models import assert_model, model

from mingle.io.files import CheckpointError, sha256, write_json
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
