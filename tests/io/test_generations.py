"""Generations of a merged folder: what a save changed can be returned to, until it is tidied away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_merge import TinyMerge, contents

import mingle
from mingle.io import generations, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import read_manifest
from mingle.io.rollback import rollback, tidy
from mingle.merging.merger import Merger


@pytest.fixture
def folder(models: TinyMerge, tmp_path: Path) -> Path:
    shutil.copytree(models.root / "merged", tmp_path / "merged")
    return tmp_path / "merged"


def named(folder: Path) -> list[str]:
    return Merger.from_pretrained(folder).task_names


def numbers(folder: Path) -> tuple[int, list[int]]:
    """The generation in use, and those that are kept."""
    manifest = read_manifest(folder)
    return manifest["generation"], [each["generation"] for each in generations.all_of(folder, manifest)]


def weights(folder: Path) -> dict[str, bytes]:
    state = Merger.from_pretrained(folder).model.state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_every_arrival_is_a_generation_with_the_bits_that_it_had(models: TinyMerge, folder: Path) -> None:
    assert numbers(folder) == (3, [1, 2, 3])
    for count in (1, 2, 3):
        rollback(folder, count)
        assert numbers(folder) == (count, [1, 2, 3])
        fresh = Merger(models.inputs / "base", "average")
        for name in "abc"[:count]:
            fresh.add(name, models.inputs / name)
        assert named(folder) == fresh.task_names
        same = {name: tensor.numpy().tobytes() for name, tensor in fresh.model.state_dict().items()}
        assert weights(folder) == same
    assert contents(folder) == contents(models.root / "merged")  # there and back


def test_merging_goes_on_from_an_earlier_generation_and_the_later_ones_stay(
    models: TinyMerge, folder: Path
) -> None:
    rollback(folder, 1)
    merger = Merger.from_pretrained(folder)
    merger.add("c", models.inputs / "c")
    merger.save_pretrained(folder)
    assert numbers(folder) == (4, [1, 2, 3, 4])
    assert [each["parent"] for each in generations.all_of(folder, read_manifest(folder))] == [None, 1, 2, 1]
    rollback(folder, 3)
    assert named(folder) == ["a", "b", "c"]


def test_a_save_that_changes_no_task_is_no_new_generation(folder: Path) -> None:
    merger = Merger.from_pretrained(folder)
    before = contents(folder)
    merger.save_pretrained(folder)
    assert contents(folder) == before
    merger.metadata["note"] = 1
    merger.matrix[-1] = [50.0, 60.0, 70.0]
    merger.save_pretrained(folder)
    assert numbers(folder) == (3, [1, 2, 3])
    assert len(list((folder / "generations").iterdir())) == 3
    rollback(folder, 1)
    rollback(folder, 3)
    again = Merger.from_pretrained(folder)
    assert again.metadata["note"] == 1 and again.matrix[-1] == [50.0, 60.0, 70.0]


def test_files_are_written_once_wherever_their_task_stands(models: TinyMerge, tmp_path: Path) -> None:
    """After a task has left, and when it comes back."""
    merger = Merger(models.inputs / "base", "mass", rank=2)
    for name in "abc":
        merger.add(name, models.inputs / name)
        merger.save_pretrained(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tasks/*")}
    merger.remove("a")
    merger.save_pretrained(tmp_path)
    merger.add("a", models.inputs / "a")
    merger.save_pretrained(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("tasks/*")} == times
    assert numbers(tmp_path) == (5, [1, 2, 3, 4, 5])
    for number, names in ((4, ["b", "c"]), (3, ["a", "b", "c"]), (5, ["b", "c", "a"])):
        rollback(tmp_path, number)
        assert named(tmp_path) == names


def test_a_changed_file_of_an_older_generation_is_not_used_again(models: TinyMerge, tmp_path: Path) -> None:
    merger = Merger(models.inputs / "base", "mass", rank=2)
    for name in "ab":
        merger.add(name, models.inputs / name)
    merger.save_pretrained(tmp_path)
    merger.remove("a")
    merger.save_pretrained(tmp_path)
    [victim] = tmp_path.glob("tasks/000-a-*")
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    merger.add("a", models.inputs / "a")
    merger.save_pretrained(tmp_path)
    assert named(tmp_path) == ["b", "a"]  # every hash is right


def test_files_that_an_earlier_version_named_are_not_written_again(
    models: TinyMerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = Merger(models.inputs / "base", "average")
    merger.add("a", models.inputs / "a")
    with monkeypatch.context() as patch:
        patch.setattr(merger_folder, "hash_of", lambda path, tensors: "f" * 64)
        merger.save_pretrained(tmp_path)
    merger.metadata["note"] = 1
    merger.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-ffffffffffff.safetensors"]
    assert named(tmp_path) == ["a"]


def test_only_as_many_are_kept_as_was_said_last(models: TinyMerge, tmp_path: Path) -> None:
    merger = Merger(models.inputs / "base", "average")
    for name in "abc":
        merger.add(name, models.inputs / name)
        merger.save_pretrained(tmp_path, keep=2 if name == "a" else None)
    assert numbers(tmp_path) == (3, [2, 3])
    assert len(list(tmp_path.glob("state-*"))) == 2
    with pytest.raises(ValueError, match="keep=0: expected 1 or more"):
        merger.save_pretrained(tmp_path, keep=0)
    rollback(tmp_path, 2)
    merger = Merger.from_pretrained(tmp_path)
    merger.add("d", models.inputs / "c")
    merger.save_pretrained(tmp_path, keep=1)
    assert numbers(tmp_path) == (4, [4])
    assert [named(tmp_path), len(list(tmp_path.glob("state-*")))] == [["a", "b", "d"], 1]


def test_tidying_frees_what_it_says_and_nothing_that_is_needed(folder: Path) -> None:
    (folder / "state-0123456789ab.safetensors").write_bytes(b"left by a killed save")
    rollback_to, before = 2, contents(folder)
    rollback(folder, rollback_to)
    (folder / "state-0123456789ab.safetensors").write_bytes(b"left by a killed save")
    before = contents(folder)
    told = tidy(folder, 1, only_tell=True)
    assert contents(folder) == before
    assert tidy(folder, 1) == told
    assert numbers(folder) == (2, [2]) and named(folder) == ["a", "b"]
    after = contents(folder)
    gone = {name: data for name, data in before.items() if name not in after}
    assert told == sum(map(len, gone.values()))
    assert len([name for name in gone if name.startswith("state-")]) == 3
    assert tidy(folder, 1) == 0


def test_tidying_keeps_the_newest_and_the_one_in_use(folder: Path) -> None:
    rollback(folder, 1)
    tidy(folder, 2)
    assert numbers(folder) == (1, [1, 3])
    rollback(folder, 3)
    assert named(folder) == ["a", "b", "c"]
    assert tidy(folder, 9) == 0


def test_generations_that_are_not_kept_or_not_whole_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="generation 7 is not kept; there are 1, 2, 3"):
        rollback(folder, 7)
    manifest = read_manifest(folder)
    first = generations.read(folder, manifest["history"][0])
    (folder / first["state"]["file"]).unlink()
    before = contents(folder)
    with pytest.raises(
        CheckpointError, match=r"state-\w+.safetensors: missing, although generation 1 names it"
    ):
        rollback(folder, 1)
    assert contents(folder) == before and named(folder) == ["a", "b", "c"]
    (folder / manifest["history"][1]["file"]).write_text("{}")
    with pytest.raises(CheckpointError, match=r"0002-\w+.json: expected .* bytes, .*`mingle tidy` forgets"):
        rollback(folder, 2)
    tidy(folder, 1)
    assert numbers(folder) == (3, [3])


def test_a_generation_that_calls_itself_another_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["history"][0]["file"] = manifest["history"][0]["file"].replace("0001", "0002")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="history: expected every generation once and in order"):
        read_manifest(folder)
    manifest["history"] = manifest["history"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="and generation 3 among them"):
        read_manifest(folder)


def old_form(folder: Path) -> None:
    """The folder as it would be without generations."""
    tidy(folder, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("generation", "parent", "history", "keep"):
        del manifest[key]
    for task in manifest["tasks"]:
        del task["model"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "generations")
    (folder / "README.md").unlink()


def test_folders_of_earlier_versions_are_read_and_their_state_becomes_the_first_generation(
    models: TinyMerge, folder: Path
) -> None:
    old_form(folder)
    assert named(folder) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="generation 1 is not kept; there are none: an earlier version"):
        rollback(folder, 1)
    assert tidy(folder, 1) == 0
    merger = Merger.from_pretrained(folder)
    merger.add("d", models.inputs / "a")
    merger.save_pretrained(folder)
    assert numbers(folder) == (2, [1, 2])
    rollback(folder, 1)
    assert named(folder) == ["a", "b", "c"]
    assert weights(folder) == weights(models.root / "merged")


def test_another_merge_in_the_same_folder_leaves_the_one_before_it(models: TinyMerge, folder: Path) -> None:
    """Also with another base, whose copy stays as long as a generation needs it."""
    other = mingle.load(models.inputs / "base")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    merger = Merger(other, "average")
    merger.add("z", models.inputs / "a")
    merger.save_pretrained(folder)
    assert len(list(folder.glob("base-*"))) == 2
    rollback(folder, 3)
    assert named(folder) == ["a", "b", "c"]
    tidy(folder, 1)
    assert len(list(folder.glob("base-*"))) == 1


def test_a_second_writer_is_refused_while_tidying_or_returning(folder: Path) -> None:
    from forks import Ready, fork, kill

    def hold(ready: Ready) -> None:
        import signal

        with merger_folder.writing(folder):
            ready()
            signal.pause()

    pid = fork(hold)
    try:
        for call in (lambda: tidy(folder, 1), lambda: rollback(folder, 1)):
            with pytest.raises(CheckpointError, match=f"being written by pid {pid} on"):
                call()
    finally:
        kill(pid)
    rollback(folder, 1)
