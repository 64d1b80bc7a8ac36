"""A command ends with 0, 1 or 2, with a message, and never with a traceback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
import yaml

from mingle.adaptation.divergence import AdaptationDiverged
from mingle.cli import inspect, main
from mingle.merging.finite import NonFiniteMerge
from mingle.merging.merger import Merger
from mingle.merging.streamed import StreamedMerger
from mingle.ops.dispatch import BackendUnavailable

FEW = ("--suite", "glyphs4", "--methods", "average")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


def failing(monkeypatch, method: str, error: BaseException | int, at: int = 1) -> None:
    """Let the n-th call of a merger's method raise, or send this process a signal."""
    calls = []

    def wrapped(real):
        def wrapper(*arguments, **options):
            calls.append(None)
            if len(calls) == at:
                if isinstance(error, BaseException):
                    raise error
                os.kill(os.getpid(), error)
            return real(*arguments, **options)

        return wrapper

    for kind, own in ((Merger, method), (StreamedMerger, {"add": "add_all"}.get(method, method))):
        if own in vars(kind):
            monkeypatch.setattr(kind, own, wrapped(getattr(kind, own)))


def ends(capsys, code: int, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return out


def test_an_interrupted_merge_says_what_is_kept_and_goes_on(config, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, "add", signal.SIGINT, at=2)
        text = ends(capsys, 1, "merge", config, "--out", out)
    assert "interrupted: what was merged is saved; the same command goes on from there" in text
    assert Merger.from_pretrained(out).task_names == ["task 0"]
    ends(capsys, 0, "merge", config, "--out", out)
    before = (out / "manifest.json").read_bytes()
    failing(monkeypatch, "add", KeyboardInterrupt())
    text = ends(capsys, 1, "add", out, "--name", "new", "--model", yaml.safe_load(config.read_text())["base"])
    assert "interrupted: nothing was changed" in text
    assert (out / "manifest.json").read_bytes() == before


@pytest.mark.usefixtures("few_images")
def test_an_interrupted_demo_and_table_say_so(tmp_path, capsys, monkeypatch):
    failing(monkeypatch, "evaluate", KeyboardInterrupt(), at=3)
    text = ends(capsys, 1, "demo", *FEW, "--out", tmp_path / "demo")
    assert "interrupted: the results of finished methods are kept; the same command starts anew" in text
    failing(monkeypatch, "add", KeyboardInterrupt(), at=2)
    text = ends(capsys, 1, "reproduce", "main", *FEW, "--out", tmp_path / "table")
    assert "interrupted: what is finished is kept; the same command goes on from there" in text
    assert (tmp_path / "table" / "table.md").exists()


def test_a_merge_that_diverges_ran_and_ended_badly(config, tmp_path, capsys, monkeypatch):
    for error in (AdaptationDiverged, NonFiniteMerge):
        with monkeypatch.context() as patch:
            failing(patch, "add", error("the loss [x] was not finite"))
            text = ends(capsys, 1, "merge", config, "--out", tmp_path / "out")
        assert "error: the loss [x] was not finite" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error", "/x[/y]"), "error: /x[/y]: Input/output error"),
        (PermissionError(13, "Permission denied", "/x"), "error: /x: Permission denied"),
        (OSError("no path"), "error: no path"),
        (BackendUnavailable("backend='triton' cannot run: [x]"), "error: backend='triton' cannot run: [x]"),
        (MemoryError("16 GB"), "error: out of memory: 16 GB"),
        (ValueError("wrong"), "error: wrong"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: 'utf-8' codec can't"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_the_machine_or_the_input_is_named(error, message, config, tmp_path, capsys, monkeypatch):
    failing(monkeypatch, "add", error)
    assert message in ends(capsys, 2, "merge", config, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["demo", "--orders", "abc"], ["demo", "--orders", "0"], ["merge"], ["export", "x"],
        ["demo", "--seed", "x"], ["demo", "--protocol", "x"], ["demo", "--orders", "9" * 5000],
        ["eval", "x", "--batch-size", "-1"], ["eval", "x", "--batch-size", str(2**40)], ["env", "x"],
        ["reproduce", "main", "--evaluate", "x"], ["reproduce", "main", "--threads", "1e3"],
        ["bench", "--device", "nowhere"], ["bench", "--device", "meta[x]"], ["bench", "--seed", "x"],
        ["bench", "--until", "x"], ["bench", "--case", "x"], ["bench", "--peer", "x"], ["bench", "x"],
    ],
    ids=lambda arguments: " ".join(arguments)[:30] or "none",
)  # fmt: skip
def test_arguments_that_cannot_be_parsed_end_in_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["bench"], ["env"]])
def test_help_ends_in_0(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: mingle" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        "steps", "steps=[", "steps=2024-13-45", "steps=!!python/object:os.system 1", "steps={[]: 1}",
        "steps=" + "9" * 5000, "steps=" + "[" * 5000, "steps=\x1b", "steps=abc", "steps=-1", "steps=1.5", "=",
        "=1", "layers=&a [*a]", "lr=", "backend=x", "backend=tritn", "constraint={}", "constraint=[x]",
        "layers={a: 1}",
    ],
    ids=lambda option: ascii(option)[:30],
)  # fmt: skip
def test_options_that_make_no_sense_end_in_2(option, tmp_path, capsys):
    few = ("--suite", "glyphs4", "--methods", "mingle", "--set", option)
    text = ends(capsys, 2, "demo", *few, "--out", tmp_path / "demo")
    assert "error: " in text and option.partition("=")[0] in text
    assert not (tmp_path / "demo").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the backend can run")
def test_a_backend_that_cannot_run_is_refused_before_work(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    few = ("--suite", "glyphs4", "--methods", "mingle", "--set", "backend=triton")
    assert "backend: 'triton' cannot run: " in ends(capsys, 2, "demo", *few, "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


DRIVER = """
import runpy
import mingle.cli.inspect
def run(args):
    raise ZeroDivisionError("of [x] by \\x1b[31m\\udcff")
mingle.cli.inspect.run = run
runpy.run_module("mingle", run_name="__main__", alter_sys=True)
"""


def test_a_bug_leaves_one_line_and_a_file(tmp_path):
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "mingle"
    script.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, script, "inspect", "x"],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(r"internal error: ZeroDivisionError: of [x] by \x1b[31m\udcff; please report it")
    (file,) = (tmp_path / "tmp").iterdir()
    assert line.endswith(f"with the file {file}")
    assert re.search(r"Traceback[^$]*in run[^$]*ZeroDivisionError: of \[x\]", file.read_text())


def test_a_bug_where_no_file_can_be_written_still_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setattr(inspect, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as found:
        main(["inspect", "x"])
    capsys.readouterr()
    sys.excepthook(found.type, found.value, found.tb)  # as Python ends
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert "the traceback could not be written: " in err


@pytest.mark.parametrize(
    ("redirection", "code", "said"), [("| true", 1, ""), (">/dev/full", 2, "No space left"), (">&-", 0, "")]
)
def test_nobody_reads_on(redirection, code, said):
    """A pipe that was closed, a full disk, no stdout at all."""
    command = f"{sys.executable} -m mingle env {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr if said else done.stderr == ""
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
