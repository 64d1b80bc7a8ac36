"""Errors say what to do next, where something can be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mingle.cli import main
from mingle.io import hub
from mingle.io.files import CheckpointError, similar
from mingle.merging.streamed import StreamedMerger


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def refusal(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().out


def changed(config: Path, **changes: object) -> Path:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changes))
    return config


def test_a_path_that_is_not_there_is_answered_with_the_nearest(config, tmp_path, base_folder, capsys):
    shutil.copytree(base_folder, tmp_path / "models" / "clip-base")
    (tmp_path / "merged").mkdir()
    near = f"; did you mean {config}?"
    assert near in refusal(capsys, "check", tmp_path / "merg.yaml")
    assert near in refusal(capsys, "merge", tmp_path / "merge.yml", "--out", tmp_path / "out")
    assert f"did you mean {tmp_path}/merged?" in refusal(capsys, "inspect", tmp_path / "mergd")
    wrong = tmp_path / "model" / "clip-base"
    text = refusal(capsys, "check", changed(config, base=str(wrong)))
    assert f"{wrong}: no such folder; did you mean {tmp_path}/models/clip-base?" in text
    nothing = refusal(capsys, "check", changed(config, base=str(tmp_path / "zzz")))
    assert f"{tmp_path}/zzz: no such folder\n" in nothing


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "/nowhere/at/all", "/proc/self/fd/0/x"])
def test_no_path_is_too_strange_to_look_for_one_like_it(path):
    assert isinstance(similar(Path(path)), str)


def test_a_relative_folder_that_looks_like_a_hub_id_is_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)
    (tmp_path / "models" / "svhn").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"hub \(no network\); did you mean models/svhn\?"):
        hub.resolve("models/svnh")


def _unreachable(*arguments, **options):
    raise OSError("no network")


def test_what_the_hub_hides_may_need_a_login(tmp_path, monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for error in (GatedRepoError, RepositoryNotFoundError):

        def hidden(*arguments, error=error, **options):
            raise error.__new__(error)  # short of an answer, whose class changes with the hub's client

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", hidden)
        with pytest.raises(CheckpointError, match="run `hf auth login` first"):
            hub.resolve("somebody/model")


def test_merges_inside_a_folder_are_named(config, tmp_path, capsys):
    out = tmp_path / "out"
    two = changed(config, order={"shuffle": True, "seeds": [1, 2]})
    assert main(["merge", str(two), "--out", str(out)]) == 0
    text = refusal(capsys, "inspect", out)
    assert f"does not hold a saved merge; there are some in {out}/order-1, {out}/order-2\n" in text


def test_a_folder_in_use_or_full_says_where_else_to_go(config, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert "; name another folder, or merge as before" in refusal(
        capsys, "merge", changed(config, method="individual"), "--out", out
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert f"{tmp_path}/full/mine is in it; name a new folder" in refusal(
        capsys, "merge", config, "--out", tmp_path / "full"
    )
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    text = refusal(capsys, "merge", config, "--out", tmp_path / "new")
    needed, spare = (int(text.split(word)[0].split()[-1]) for word in (" bytes and", " spare"))
    assert f"make room for {needed + spare - 1000} more, or name a folder on another disk" in text


def test_a_merge_of_a_newer_version_names_the_upgrade(config, tmp_path, capsys):
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    manifest = tmp_path / "out" / "manifest.json"
    for version, advised in ((99, True), (0, False), ("x", False)):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": version}))
        text = refusal(capsys, "inspect", tmp_path / "out")
        assert ("pip install --upgrade mingle-merge" in text) == advised


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes.\nmore"),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_too_little_memory_is_no_fault_of_ours(error, config, tmp_path, capsys, monkeypatch):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(StreamedMerger, "add_all", failing)
    text = refusal(capsys, "merge", config, "--out", tmp_path / "out")
    reason = str(error).splitlines()[0]
    assert f"error: out of memory: {reason}; `mingle check` says how much a merge takes\n" in text


def test_an_error_of_another_kind_stays_one(config, tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(StreamedMerger, "add_all", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["merge", str(config), "--out", str(tmp_path / "out")])
