"""What a killed first save left is cleared, and nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from output_folders import refusal, tree

from mingle.cli import main
from mingle.io import merger_folder


def killed_at(monkeypatch, call: str, number: int) -> list[None]:
    """Let the n-th such call of the system end the command, without any of what would tidy up after it."""
    real, calls = getattr(os, call), []

    def dying(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            os._exit(9)
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, dying)
    return calls


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("call", "number"), [(c, n) for c in ("fsync", "replace") for n in (1, 2, 3, 4, 5)])
def test_a_merge_killed_in_its_first_save_starts_anew(config, tmp_path, call, number, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    pid = os.fork()
    if pid == 0:
        with monkeypatch.context() as patch:
            killed_at(patch, call, number)
            os._exit(main(["merge", str(config), "--out", str(out)]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert any(path.is_file() for path in out.rglob("*"))
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert main(["merge", str(config), "--out", str(whole)]) == 0
    assert tree(out) == tree(whole)


def leftovers(out: Path) -> None:
    """Everything that a first save of another merge may leave."""
    for name in (
        "base-0123456789ab/model.safetensors", "base-0123456789ab/old.json", ".lock", ".DS_Store",
        "base-0123456789ab/.mingle-tmp-1-0123456789abcdef-config.json", "state-0123456789ab.safetensors",
        "tasks/000-a-0123456789ab.safetensors", ".mingle-tmp-1-0123456789abcdef-manifest.json",
    ):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")


def test_our_own_leftovers_are_cleared(config, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    leftovers(out)
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert main(["merge", str(config), "--out", str(whole)]) == 0
    assert tree(out) == tree(whole) | {".DS_Store": b"half"}


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt", "base-0123456789ab/notes.md", "base-0123456789ab/sub/config.json", "base-0123/x",
        "tasks/mine.safetensors", "tasks/sub/000-a-0123456789ab.safetensors", "state-0123456789ab.bin",
        "state-0123456789ab.safetensors/x", "base-0123456789ab.json", "000-a-0123456789ab.safetensors",
    ],
)  # fmt: skip
def test_anything_foreign_is_named_and_kept(name, config, tmp_path, capsys):
    out = tmp_path / "out"
    leftovers(out)
    (out / "state-0123456789ab.safetensors").unlink()
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = tree(out)
    text = refusal(capsys, "merge", config, "--out", out)
    top = name if name.startswith(("base-0123456789ab/", "tasks")) else name.partition("/")[0]
    assert f"{out}: not empty, and not a merge that could be resumed: {out}/" in text
    assert str(out / top).removesuffix("/config.json").removesuffix("/000-a-0123456789ab.safetensors") in text
    assert tree(out) == before


def test_a_link_is_not_ours(config, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "base-0123456789ab").symlink_to(tmp_path / "precious")
    assert "base-0123456789ab is in it" in refusal(capsys, "merge", config, "--out", tmp_path / "out")
    assert merger_folder.foreign(tmp_path / "out") == tmp_path / "out" / "base-0123456789ab"
    assert (tmp_path / "precious" / "config.json").read_text() == "mine"


def test_an_export_clears_what_a_killed_one_left_and_nothing_else(merged, tmp_path, capsys):
    command = ("export", merged, "--task", "task 0", "--out", tmp_path / "plain")
    staging = tmp_path / ".mingle-export-plain"
    (staging / "sub").mkdir(parents=True)
    (staging / "sub" / "x.json").write_text("mine")
    assert f"{staging}/sub/x.json: in the way of an export" in refusal(capsys, *command)
    (staging / "sub" / "x.json").rename(staging / "sub" / "adapter_config.json")
    (staging / "sub" / "below").mkdir()
    assert f"{staging}/sub/below: in the way of an export" in refusal(capsys, *command)
    shutil.rmtree(staging)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x.json").write_text("mine")
    staging.symlink_to(tmp_path / "precious")
    assert f"{staging}: in the way of an export" in refusal(capsys, *command)
    assert (tmp_path / "precious" / "x.json").read_text() == "mine"
    staging.unlink()
    staging.mkdir()
    (staging / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (staging / "empty").mkdir()
    (staging / "one").mkdir()
    (staging / "one" / "adapter_model.safetensors").write_bytes(b"half")
    assert main([str(argument) for argument in command]) == 0
    assert not staging.exists()
    assert not (tmp_path / "plain" / "model-00001-of-00002.safetensors").exists()
