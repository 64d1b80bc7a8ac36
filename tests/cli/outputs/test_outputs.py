"""Where a command cannot write, it says so before it works."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from output_folders import refusal, tree

from mingle.cli import main
from mingle.io import files
from mingle.io.files import CheckpointError, writable
from mingle.merging.merger import Merger

LONG = "x" * 300


def impossible(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Outputs that cannot be, each with its reason."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "a file": (tmp_path / "file", "file: "),
        "below a file": (tmp_path / "file" / "a" / "b", "not a folder"),
        "below proc": (Path("/proc/mingle/out"), "cannot be written to: No such file"),
        "below sys": (Path("/sys/mingle"), "cannot be written to: "),
        "too long": (tmp_path / "a" / LONG, "name too long"),
        "a dangling link": (tmp_path / "link", f"a symlink to {tmp_path}/nowhere, which does not exist"),
        "below a dangling link": (tmp_path / "link" / "a", "which does not exist"),
        "a link to itself": (tmp_path / "loop", "which does not exist"),
    }


@pytest.mark.parametrize("command", ["merge", "export", "demo", "reproduce", "add", "report"])
def test_impossible_outputs_are_refused_before_work(command, config, merged, tmp_path, capsys, monkeypatch):
    few = ("--suite", "glyphs4", "--methods", "average")
    places = impossible(tmp_path)
    before = tree(tmp_path)

    def working(*arguments, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(Merger, "add", working)
    monkeypatch.setattr(Merger, "evaluate", working)
    if command != "add":
        monkeypatch.setattr(Merger, "from_pretrained", working)
    for kind, (out, reason) in places.items():
        text = refusal(
            capsys,
            *{
                "merge": ("merge", config, "--out", out),
                "export": ("export", merged, "--out", out, "--task", "task 0"),
                "demo": ("demo", *few, "--out", out),
                "reproduce": ("reproduce", "main", *few, "--out", out),
                "add": ("add", out, "--name", "new", "--model", merged),
                "report": ("report", out),
            }[command],
        )
        assert str(out).partition("/a")[0] in text, kind
        if command not in ("report", "add"):
            assert reason in text, kind
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["", "a\0b"], ids=["empty", "NUL"])
def test_what_is_not_a_path_is_refused(out, config, merged, capsys):
    commands = [
        ("merge", config, "--out", out), ("export", merged, "--out", out), ("demo", "--out", out),
        ("reproduce", "main", "--out", out), ("add", out, "--name", "x", "--model", "y"), ("report", out),
        ("bench", "--quick", "--out", out), ("bench", "--quick", "--plots", out), ("inspect", out),
        ("eval", out), ("check", out),
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in command])
        assert ended.value.code == 2, command
        assert f"invalid file_path value: {out!r}" in capsys.readouterr().err


def test_bench_probes_its_outputs(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments in (
        ["--out", "/proc/mingle/x.json"],
        ["--out", str(tmp_path)],
        ["--plots", str(tmp_path / "file")],
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "--quick", *arguments])
        assert ended.value.code == 2
        assert arguments[1].removesuffix("/x.json") in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_probe_that_fails_gives_its_reason_and_leaves_nothing(code, config, tmp_path, capsys, monkeypatch):
    """As root no permission binds, so the system's answer is put in its mouth."""
    real = open

    def refusing(path, mode="r", *arguments, **options):
        if ".mingle-tmp-" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(files, "open", refusing, raising=False)
    before = tree(tmp_path)
    text = refusal(capsys, "merge", config, "--out", tmp_path / "new" / "out")
    assert f"{tmp_path}/new/out: cannot be written to: {os.strerror(code)}" in text
    assert tree(tmp_path) == before


def test_a_read_only_mount_is_noticed(tmp_path, config, capsys):
    place = tmp_path / "mount"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        for out in (place, place / "new"):
            text = refusal(capsys, "merge", config, "--out", out)
            assert f"{out}: cannot be written to: Read-only file system" in text
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_probe_leaves_nothing_and_takes_nothing_away(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "a" / "b" / "c", tmp_path / "there" / "x"):
        writable(folder)
    assert tree(tmp_path) == {"there": None}


def test_names_as_long_as_a_file_s_can_be(config, merged, tmp_path, base_folder):
    """The names of temporary files and folders are not longer still."""
    longest = "ü" * 127
    assert main(["merge", str(config), "--out", str(tmp_path / longest)]) == 0
    assert main(["export", str(merged), "--task", "task 0", "--out", str(tmp_path / ("é" * 127))]) == 0
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    (base / ("x" * 250 + ".json")).write_text("{}")
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"base": str(base)}))
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0


def test_a_file_in_the_place_of_a_folder_is_named_in_python_too(base_model, tuned_states, tmp_path):
    merger = Merger(base_model, "average")
    merger.add("a", tuned_states[0])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file: "):
        merger.save_pretrained(tmp_path / "file")
