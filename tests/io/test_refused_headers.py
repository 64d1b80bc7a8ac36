"""Files that CheckpointReader refuses: every defect of a header is named, and no edit crashes it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import edit_bytes
from raw_files import entry, refusal, write_raw, write_sharded
from safetensors.torch import save_file

from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader

# Headers


def test_truncation_names_expected_and_found_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refusal(tmp_path, str(path), f"expected {len(data)} bytes, found {len(data) - 5}")
    path.write_bytes(data + b"\0")
    refusal(tmp_path, str(path), f"expected {len(data)} bytes, found {len(data) + 1}")
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[: start - 1])
    refusal(tmp_path, str(path), f"expected at least {start} bytes, found {start - 1}")
    path.write_bytes(b"")
    refusal(tmp_path, str(path), "expected at least 8 bytes, found 0")


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((16_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    refusal(tmp_path, str(path), "expected a header of at most 16000000 bytes, found 16000001")


MALFORMED = {
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "not an object": [1],
    "dtype a list": entry(dtype=["F32"]),
    "shape a number": entry(shape=1),
    "shape a float": entry(shape=[1.0]),
    "shape a bool": entry(shape=[True]),
    "shape negative": entry(shape=[-1]),
    "shape of rank 65": entry(shape=[1] * 65),
    "length of 64 bits": entry(shape=[2**63]),
    "one offset": entry(offsets=[4]),
    "offset null": entry(offsets=[None, 4]),
    "offset negative": entry(offsets=[-4, 0]),
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_entry_is_named(tmp_path: Path, value: Any) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"w": value}, bytes(4))
    refusal(tmp_path, f"{path}: tensor 'w': malformed header entry")


INCONSISTENT = {
    "unknown dtype": (entry(dtype="F33"), "unknown dtype 'F33'"),
    "too few bytes": (entry(shape=[2]), "expected 8 bytes for F32 of shape [2], found 4"),
    "too many bytes": (entry(shape=[0]), "expected 0 bytes for F32 of shape [0], found 4"),
    "reversed offsets": (entry(offsets=[4, 0]), "expected 4 bytes for F32 of shape [1], found -4"),
    "terabytes": (entry(shape=[1 << 40]), f"expected {4 << 40} bytes"),
    "product overflow": (entry(shape=[1 << 31, 1 << 31]), "absurd shape [2147483648, 2147483648]"),
    "product overflow in an empty tensor": (
        entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0]),
        "absurd shape [0, ",
    ),
    "hole before": (entry(offsets=[4, 8]), "expected its data at offset 0, found 4"),
}


@pytest.mark.parametrize(("value", "part"), INCONSISTENT.values(), ids=INCONSISTENT.keys())
def test_an_inconsistent_entry_is_named(tmp_path: Path, value: Any, part: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"w": value}, bytes(4))
    refusal(tmp_path, f"{path}: tensor 'w'", part)


@pytest.mark.parametrize(("second", "found"), [([2, 6], 2), ([6, 10], 6)], ids=["overlap", "hole"])
def test_overlaps_and_holes_are_refused(tmp_path: Path, second: list[int], found: int) -> None:
    path = write_raw(
        tmp_path / "model.safetensors", {"a": entry(), "b": entry(offsets=second)}, bytes(second[1])
    )
    refusal(tmp_path, f"{path}: tensor 'b': expected its data at offset 4, found {found}")


def test_data_beyond_the_end_of_the_file_is_refused(tmp_path: Path) -> None:
    path = write_raw(
        tmp_path / "model.safetensors", {"w": entry(shape=[1 << 38], offsets=[0, 1 << 40])}, bytes(4)
    )
    size = path.stat().st_size
    refusal(tmp_path, str(path), f"expected {size - 4 + (1 << 40)} bytes, found {size}")


BAD_JSON = {
    "duplicate tensor": (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{}}',
        "duplicate key 'w'",
    ),
    "duplicate field": (
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "duplicate key 'dtype'",
    ),
    "syntax": (b'{"w":}', "line 1, column 6"),
    "not UTF-8": (b'{"\xff":{}}', "utf-8"),
    "nested too deep": (b"[" * 200_000, "recursion"),
    "5000 digits": (b'{"w":' + b"1" * 5000 + b"}", "4300"),
    "not an object": (b"[]", "expected a JSON object"),
    "empty": (b"", "line 1, column 1"),
}


@pytest.mark.parametrize(("header", "part"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_a_header_of_bad_json_is_refused(tmp_path: Path, header: bytes, part: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(4))
    refusal(tmp_path, f"{path}: header: ", part)


@pytest.mark.parametrize("metadata", [1, {"a": 1}, ["a"]], ids=str)
def test_malformed_metadata_is_refused(tmp_path: Path, metadata: Any) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"__metadata__": metadata, "w": entry()}, bytes(4))
    refusal(tmp_path, str(path))


# Fuzz


def outcome(path: Path) -> bool:
    """Whether the whole checkpoint reads; any exception but CheckpointError is the test's failure."""
    try:
        CheckpointReader(path).state_dict()
    except CheckpointError as error:
        assert str(path.parent) in str(error)
        return False
    return True


def test_a_mutated_file_reads_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {"w": torch.ones(4, 5), "h": torch.ones(3).bfloat16(), "n": torch.arange(4), "s": torch.tensor(True)},
        path,
    )
    data = path.read_bytes()
    results = []
    for seed in range(400):
        path.write_bytes(edit_bytes(data, random.Random(seed)))
        results.append(outcome(path))
    assert 20 < sum(results) < 380, "most edits of the data are harmless, most edits of the header are not"


def test_a_mutated_index_reads_or_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    data = index.read_bytes()
    results = []
    for seed in range(300):
        index.write_bytes(edit_bytes(data, random.Random(seed)))
        results.append(outcome(index))
    assert 5 < sum(results) < 280


NUMBERS = st.sampled_from([0, 1, 2, 4, 8, -1, 2**31, 2**62, 2**63, 2**64, 10**400, 1.5, None, True, "1"])
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BOOL", "I64", "F4", "F8_E8M0", "f32", 1]),
            "shape": st.lists(NUMBERS, max_size=3),
            "data_offsets": st.lists(NUMBERS, max_size=3)
            | st.sampled_from([[0, 4], [0, 8], [4, 8], [0, 0], [8, 8]]),
        }
    ),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__", "\ud800"]), ENTRIES, max_size=3),
    size=st.sampled_from([0, 4, 8]),
)
def test_any_header_reads_or_is_refused(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    outcome(write_raw(tmp_path / "model.safetensors", header, bytes(size)))
