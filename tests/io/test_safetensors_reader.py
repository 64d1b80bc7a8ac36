"""What CheckpointReader accepts, how it reads, and every refusal with what its message must say."""

from __future__ import annotations

import json
import os
import pickle
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader

FLOATS = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file in the outer form of safetensors with any header, which may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_sharded(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(3.0), "unlisted": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.arange(4)}, folder / "two.safetensors")
    write_index(folder, {"b": "two.safetensors", "a": "one.safetensors"})


def write_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


def refusal(path: Path, *parts: str) -> str:
    """The message with which opening `path` is refused; it holds every one of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    return message


# Reading


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_reads_a_file_by_itself_and_through_its_folder(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.randn(2, 3), "b": torch.tensor(7)}
    save_file(tensors, tmp_path / name)
    for source in (tmp_path, str(tmp_path), tmp_path / name):
        reader = CheckpointReader(source)
        assert reader.keys() == list(reader) == ["b", "w"]
        assert len(reader) == 2 and "w" in reader and "x" not in reader
        assert (reader.shape("w"), reader.dtype("w")) == ((2, 3), torch.float32)
        assert (reader.shape("b"), reader.dtype("b")) == ((), torch.int64)
        assert torch.equal(reader.tensor("w"), tensors["w"]) and torch.equal(
            reader.state_dict()["b"], tensors["b"]
        )


def test_reads_shards_and_only_what_the_index_lists(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert reader.keys() == ["a", "b"]
    assert torch.equal(reader.tensor("a"), torch.arange(3.0)) and torch.equal(
        reader.tensor("b"), torch.arange(4)
    )


def test_a_whole_model_is_preferred_to_shards_and_an_adapter(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"adapter": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert CheckpointReader(tmp_path).keys() == ["a", "b"]
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path).keys() == ["whole"]


def test_every_read_is_a_fresh_tensor(tmp_path: Path) -> None:
    save_file({"w": torch.ones(5)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    reader.tensor("w").zero_()
    assert torch.equal(reader.tensor("w"), torch.ones(5))


def test_a_rename_over_the_file_does_not_change_an_open_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5)}, path)
    reader = CheckpointReader(path)
    save_file({"w": torch.zeros(5)}, tmp_path / "next")
    os.replace(tmp_path / "next", path)
    assert torch.equal(reader.tensor("w"), torch.ones(5))
    assert torch.equal(CheckpointReader(path).tensor("w"), torch.zeros(5))


def test_a_file_truncated_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(5000)}, path)
    reader = CheckpointReader(path)
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match=f"{path}.* w "):
        reader.tensor("w")


def test_an_unknown_tensor_is_named_with_the_closest_one(tmp_path: Path) -> None:
    save_file(
        {"layers.0.weight": torch.ones(1), "layers.0.bias": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    reader = CheckpointReader(tmp_path)
    for ask in (reader.tensor, reader.shape, reader.dtype):
        with pytest.raises(
            CheckpointError,
            match=r"model\.safetensors: no tensor 'layer\.0\.wieght'; did you mean 'layers\.0\.weight'",
        ):
            ask("layer.0.wieght")
    with pytest.raises(CheckpointError, match=r"no tensor '%%%'$"):
        reader.tensor("%%%")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_non_finite_values_are_counted_and_located(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = values[2, 0] = float("nan")
    tensors = {
        "bad": values.to(dtype),
        "scalar": torch.tensor(float("nan")).to(dtype),
        "good": torch.ones(3).to(dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        reader.tensor("bad")
    assert (
        str(caught.value)
        == f"{tmp_path}/model.safetensors: tensor 'bad': 2 of 12 values are not finite, the first at (1, 2)"
    )
    with pytest.raises(CheckpointError, match=r"'scalar': 1 of 1 values are not finite, the first at \(\)"):
        reader.tensor("scalar")
    with pytest.raises(CheckpointError, match="'bad'"):
        reader.state_dict()
    assert reader.tensor("good").dtype == dtype
    assert reader.tensor("bad", check_finite=False).dtype == dtype
    assert set(reader.state_dict(check_finite=False)) == set(tensors)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinities_are_not_finite(tmp_path: Path, value: float) -> None:
    save_file({"w": torch.tensor([0.0, value])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 2 .* \(1,\)"):
        CheckpointReader(tmp_path).tensor("w")


# What is there


def test_nothing_there_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "runs.bin").mkdir()
    refusal(
        tmp_path,
        str(tmp_path),
        "model.safetensors,",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
    )
    refusal(tmp_path / "absent", f"{tmp_path}/absent: no such file or folder")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refusal(tmp_path, "no checkpoint")
    refusal(tmp_path / "model.safetensors", "no such file")


class Bomb:
    """Unpickling an instance creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.bin", "x.pt", "x.pth", "x.ckpt"])
def test_pickles_are_refused_and_not_loaded(tmp_path: Path, name: str) -> None:
    fired = tmp_path / "fired"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(fired)))
    for source in (tmp_path, tmp_path / name):
        refusal(
            source, str(source), "loading one runs code", "trusted environment", "weights_only=True", name
        )
    write_index(tmp_path, {"a": name})
    refusal(tmp_path, name, "loading one runs code")
    assert not fired.exists()


def test_the_conversion_command_converts(tmp_path: Path) -> None:
    """Sharded weights beside optimizer state, in a folder whose name needs quoting, with a transposed and a
    shared tensor.
    """
    folder = tmp_path / "it's a model"
    folder.mkdir()
    tied = torch.randn(2)
    torch.save(
        {"a": torch.arange(6.0).reshape(2, 3).T, "tied": tied}, folder / "pytorch_model-00001-of-00002.bin"
    )
    torch.save({"b": tied, "c": tied}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"state": torch.zeros(1000)}, folder / "optimizer.pt")
    program, *arguments = shlex.split(refusal(folder).splitlines()[-1])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, timeout=60)
    reader = CheckpointReader(folder)
    assert reader.keys() == ["a", "b", "c", "tied"]
    assert torch.equal(reader.tensor("a"), torch.arange(6.0).reshape(2, 3).T) and torch.equal(
        reader.tensor("c"), tied
    )


def test_the_conversion_command_picks_the_weights(tmp_path: Path) -> None:
    (tmp_path / "big.pt").write_bytes(bytes(100))
    (tmp_path / "training_args.bin").write_bytes(bytes(10))
    assert "training_args.bin" not in refusal(tmp_path, f"{tmp_path}/big.pt", f"{tmp_path}/model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(bytes(10))
    assert "big.pt" not in refusal(
        tmp_path, f"{tmp_path}/adapter_model.bin", f"{tmp_path}/adapter_model.safetensors"
    )


# Shards


def test_a_missing_shard_is_named_with_its_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    refusal(tmp_path, f"{tmp_path}/model.safetensors.index.json", "shard 'two.safetensors' is missing")


def test_a_tensor_missing_from_its_shard_is_named_with_both_files(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"a": "two.safetensors"})
    refusal(tmp_path, f"{tmp_path}/model.safetensors.index.json", "tensor 'a'", f"{tmp_path}/two.safetensors")


@pytest.mark.parametrize(
    "weight_map", [None, [], "one.safetensors", {"a": 1}, {"a": ["one.safetensors"]}], ids=str
)
def test_a_malformed_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_sharded(tmp_path)
    refusal(write_index(tmp_path, weight_map), "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}"])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refusal(tmp_path, "model.safetensors.index.json", "weight_map")


OUTSIDE = [
    "../outside.safetensors",
    "{absolute}",
    "sub/../../outside.safetensors",
    "..\\outside.safetensors",
    "C:\\x",
    "link",
    "linked/x",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_outside_the_folder_is_refused_before_any_is_opened(tmp_path: Path, shard: str) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    (tmp_path / "elsewhere").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere" / "x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    # Opened first, this shard would raise another error.
    (folder / " first.safetensors").write_bytes(b"")
    shard = shard.format(absolute=outside)
    write_index(folder, {"a": shard, "b": " first.safetensors"})
    refusal(folder, str(folder), "refusing", "outside the folder")
    write_index(folder, {"b": " first.safetensors"})
    refusal(folder, " first.safetensors", "truncated")


@pytest.mark.parametrize("shard", ["a\0b", "\ud800", "x" * 5000, "", ".", "loop"])
def test_a_shard_that_cannot_be_a_file_is_refused(tmp_path: Path, shard: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_index(tmp_path, {"a": shard})
    refusal(tmp_path, str(tmp_path), repr(shard))


def test_a_model_linked_from_outside_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    refusal(folder, f"{folder}/model.safetensors", f"{tmp_path}/outside.safetensors")
    assert CheckpointReader(folder / "model.safetensors").keys() == ["a"], (
        "a file named by the caller may be a link"
    )


def test_a_hub_cache_snapshot_is_read_through_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_sharded(tmp_path / "plain")
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert CheckpointReader(snapshot).keys() == ["a", "b"]
    (tmp_path / "named").symlink_to(snapshot)
    assert CheckpointReader(tmp_path / "named").keys() == ["a", "b"]


NOT_BLOBS = [
    ("models--a--b/snapshots/0123abc", "models--a--c/blobs/1"),
    ("models--a--b/snapshots/0123abc", "models--a--b/secret"),
    ("models--a--b/snapshots/0123abc", "models--a--b/blobs/sub/1"),
    ("models--a--b/refs/0123abc", "models--a--b/blobs/1"),
    ("home/snapshots/0123abc", "home/blobs/1"),
]


@pytest.mark.parametrize(("snapshot", "target"), NOT_BLOBS)
def test_only_a_hub_cache_snapshot_reaches_blobs_and_only_its_own(
    tmp_path: Path, snapshot: str, target: str
) -> None:
    folder = tmp_path / snapshot
    for parent in (folder, (tmp_path / target).parent):
        parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, tmp_path / target)
    (folder / "model.safetensors").symlink_to(tmp_path / target)
    refusal(folder, f"{folder}/model.safetensors", f"{tmp_path}/{target}", "outside the folder")


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
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    refusal(tmp_path, str(path), "expected a header of at most 100000000 bytes, found 100000001")


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


TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"0",
    b"9",
    b"-1",
    b"1e9",
    b"null",
    b"\\u0000",
    b"F64",
    b"\xff\xff\xff",
]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """`data` after one or two edits: a bit flipped, bytes cut, bytes inserted, or bytes replaced by a piece
    of JSON.
    """
    result = bytearray(data)
    for _ in range(chance.randint(1, 2)):
        place = chance.randrange(len(result) + 1)
        match chance.randrange(5):
            case 0 | 1 if place < len(result):
                result[place] ^= 1 << chance.randrange(8)
            case 2:
                del result[place : place + chance.choice([1, 4, len(result)])]
            case 3:
                result[place:place] = chance.randbytes(chance.choice([1, 8]))
            case _:
                token = chance.choice(TOKENS)
                result[place : place + len(token)] = token
    return bytes(result)


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
        path.write_bytes(mutate(data, random.Random(seed)))
        results.append(outcome(path))
    assert 20 < sum(results) < 380, "most edits of the data are harmless, most edits of the header are not"


def test_a_mutated_index_reads_or_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    data = index.read_bytes()
    results = []
    for seed in range(300):
        index.write_bytes(mutate(data, random.Random(seed)))
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
