"""Folders that CheckpointReader refuses: empty ones, pickles, missing shards, paths that lead outside."""

from __future__ import annotations

import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_files import refusal, write_index, write_sharded
from safetensors.torch import save_file

from mingle.io.safetensors import CheckpointReader

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
def test_pickles_are_refused_unread_with_the_conversion_command(tmp_path: Path, name: str) -> None:
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
    refusal(tmp_path, str(tmp_path), repr(shard)[:200])


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
