"""Where a command cannot write, it says so before it works; what a killed first save left is cleared."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from merge_files import merge_file

from mingle.cli import main
from mingle.io import files, merger_folder
from mingle.io.files import CheckpointError, writable
from mingle.merging.merger import Merger
from mingle.runs import room
from mingle.tasks.clip import ClipTask

LONG = "x" * 300


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def config(tmp_path, base_folder, tuned_folders) -> Path:
    experts = {f"task {i}": folder for i, folder in enumerate(tuned_folders[:2])}
    return merge_file(tmp_path, base_folder, experts, "individual")


@pytest.fixture
def merged(config, tmp_path) -> Path:
    assert main(["merge", str(config), "--out", str(tmp_path / "merged")]) == 0
    return tmp_path / "merged"


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().out


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder but what it took, and the page that is made of the rest."""
    beside = ("timings.json", "report.html")
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_symlink() and path.name not in beside
    }


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


def with_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=free))


def test_a_disk_without_room_is_refused_before_work(config, tmp_path, base_folder, capsys, monkeypatch):
    size = room.of_merge("individual", {}, base_folder, ClipTask())
    needed, spare = size.base + 2 * size.task, 16 << 20
    with_free(monkeypatch, needed + spare - 1)
    text = refusal(capsys, "merge", config, "--out", tmp_path / "out")
    assert f"{tmp_path}/out: disk full: {needed} bytes and {spare} spare are needed" in text
    assert f"{needed + spare - 1} are free" in text
    assert not (tmp_path / "out").exists()
    few = ("--suite", "glyphs4", "--methods", "average", "--out", tmp_path / "x")
    assert "disk full" in refusal(capsys, "demo", *few)
    assert "disk full" in refusal(capsys, "reproduce", "main", *few)
    monkeypatch.undo()
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    with_free(monkeypatch, spare)
    before = tree(tmp_path / "out")
    model = json.loads(json.dumps(yaml.safe_load(config.read_text())))["experts"][0]["model"]
    assert "disk full" in refusal(capsys, "add", tmp_path / "out", "--name", "new", "--model", model)
    assert "disk full" in refusal(
        capsys, "export", tmp_path / "out", "--task", "task 0", "--out", tmp_path / "plain"
    )
    assert tree(tmp_path / "out") == before
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    "method", ["average", "individual", "pre-trained", "opcm", "consensus-ta", "tsv-m", "iso-c", "wudi"]
)
def test_the_estimate_covers_what_a_merge_takes(method, config, tmp_path, base_folder):
    content = yaml.safe_load(config.read_text()) | {"method": method}
    if method == "consensus-ta":
        content["options"] = {"masks": "all"}
    config.write_text(yaml.safe_dump(content))
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    size = room.of_merge(method, content.get("options", {}), base_folder, ClipTask())
    headers = 64 << 10
    assert taken <= size.base + size.saved_each(2) + headers
    assert size.base + size.saved_each(2) < 4 * taken


@pytest.mark.parametrize("method", ["mingle", "routed", "wemoe"])
def test_the_estimate_covers_experts(method, base_folder, tuned_states, samples, tmp_path):
    options = {"rank": 4} | ({} if method == "routed" else {"steps": 1})
    options |= {"depths": (0,)} if method == "routed" else {}
    merger = Merger(base_folder, method, **options)
    for i in range(2):
        merger.add(f"task {i}", tuned_states[i], samples[i])
    merger.save_pretrained(tmp_path)
    size = room.of_merge(method, options, base_folder, ClipTask())
    largest = max(path.stat().st_size for path in (tmp_path / "tasks").iterdir())
    assert size.task / 2 < largest < size.task + (64 << 10)


# What a killed first save leaves


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
