"""JSON files and copies: what is written, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from two_models import assert_model, model

from mingle.io.files import CheckpointError, read_json, write_copy, write_json
from mingle.io.safetensors import write_tensors


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
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(CheckpointError, match=f"{path}: not written"):
            write_json(path, value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_name_that_is_not_utf_8_is_the_same_again(tmp_path: Path) -> None:
    """A file may be called b"\xff", which is half of a surrogate pair in Python."""
    value = {os.fsdecode(b"a\xff"): ["\ud800", "é"]}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")


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
