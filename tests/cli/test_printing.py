"""What goes where: tables, or one JSON document, on stdout; messages and progress; and none of these."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from merge_files import merge_file
from stub_suite import NAMES

from mingle import cli
from mingle.adaptation.trace import StepProgress
from mingle.cli import main, output, progress
from mingle.cli.progress import bars, stages
from mingle.merging.evaluate import Result
from mingle.merging.merger import Merger
from mingle.merging.parts import PartsProgress

pytestmark = pytest.mark.usefixtures("stub")
#: commands that find nothing, or serve a page
WITHOUT_JSON = {"completion", "play"}
#: command → what its document has at least
KEYS = {
    "demo": {"folder", "suite", "methods"},
    "reproduce": {"folder", "table", "tables"},
    "check": {"config", "method", "settings", "orders", "experts", "evaluation", "costs"},
    "merge": {"folder", "method", "orders"},
    "add": {"folder", "tasks", "matrix", "acc", "bwt"},
    "eval": {"folder", "tasks", "matrix", "acc", "bwt"},
    "explain": {"folder", "steps", "tasks"},
    "inspect": {"folder", "method", "options", "tasks", "removed", "generations"},
    "remove": {"folder", "stays", "tasks", "matrix", "acc", "bwt"},
    "rollback": {"folder", "generation", "tasks"},
    "tidy": {"folder", "bytes", "dry_run"},
    "export": {"folder", "format", "task"},
    "report": {"folder", "suite", "methods"},
    "bench": {"selections", "cases", "peers"},
    "env": {"torch", "threads", "triton"},
}


@pytest.fixture(autouse=True)
def _without_bars(monkeypatch) -> None:
    """A command starts with this; here transformers is imported before."""
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)


@pytest.fixture
def config(tmp_path, base_folder, tuned_folders) -> Path:
    experts = dict(zip(NAMES[:2], tuned_folders, strict=False))
    return merge_file(tmp_path, base_folder, experts, "average", eval={"suite": "stub"})


@pytest.fixture
def words(config, tmp_path, tuned_folders, request) -> list[str]:
    """The words of one command, and what it needs is there."""
    name, out, merged = request.param, tmp_path / "new", tmp_path / "merged"
    few = ["--suite", "stub", "--methods", "pre-trained,average", "--out", out]
    if name == "report":
        assert main(["demo", *map(str, few)]) == 0
    if name == "remove":  # an average cannot be taken apart
        config.write_text(config.read_text().replace("average", "individual"))
    if name in ("add", "eval", "explain", "inspect", "export", "remove", "rollback", "tidy"):
        assert main(["merge", str(config), "--out", str(merged)]) == 0
    more = {
        "demo": few,
        "reproduce": ["main", *few],
        "merge": [config, "--out", out],
        "check": [config],
        "add": [merged, "--name", NAMES[2], "--model", tuned_folders[2]],
        "export": [merged, "--out", out],
        "remove": [merged, NAMES[0]],
        "rollback": [merged, "--to", 1],
        "report": [out],
        "bench": ["--list"],
        "env": [],
    }
    return [name, *map(str, more.get(name, [merged]))]


def said(capsys, *words: object, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    return capsys.readouterr()


every_command = pytest.mark.parametrize(
    "words", [name for name in cli.parsers()[1].choices if name not in WITHOUT_JSON], indirect=True
)


@every_command
def test_with_json_stdout_holds_one_document_and_nothing_else(words, capsys):
    out, _ = said(capsys, *words, "--json")
    found = json.loads(out)
    assert out.isascii() and found.keys() >= KEYS[words[0]]


@every_command
def test_quietly_there_is_the_result_and_no_message(words, capsys):
    out, err = said(capsys, *words, "--quiet")
    loud = ("order 1", "measuring one", "results, plots", "merged model: ", "plain model", "table and")
    assert err == "" and not any(message in out for message in loud)
    assert ("method: " in out) == (words[0] == "check")
    assert bool(out) == (words[0] != "export")


@pytest.mark.parametrize("words", ["merge"], indirect=True)
def test_the_document_has_the_numbers_of_the_table(words, config, tmp_path, capsys):
    out, err = said(capsys, *words, "--json")
    found = json.loads(out)
    result = Merger.from_pretrained(tmp_path / "new").result()
    (order,) = found["orders"]
    assert (order["matrix"], order["acc"], order["bwt"]) == (result.matrix, result.acc, result.bwt)
    assert found["folder"] == str(tmp_path / "new") and "order 1, task 2 of 2: two" in err
    shown, err = said(capsys, "eval", tmp_path / "new")
    assert f"ACC {result.acc:.1f} %" in shown and err == ""


def test_numbers_that_were_not_measured_are_null(config, tmp_path, capsys):
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(content | {"eval": {"suite": None}}))
    out, _ = said(capsys, "merge", config, "--out", tmp_path / "new", "--json")
    (order,) = json.loads(out)["orders"]
    assert order["acc"] is order["bwt"] is order["matrix"][1][0] is None


def test_an_error_leaves_stdout_empty_and_is_said_although_quiet(config, tmp_path, capsys):
    out, err = said(capsys, "inspect", tmp_path / "nowhere", "--json", "--quiet", code=2)
    assert out == "" and err.startswith("error: ") and "nowhere" in err
    out, err = said(capsys, "inspect", tmp_path / "nowhere", "--quiet", code=2)
    assert out.startswith("error: ") and err == ""  # and the next command is itself again


def test_nobody_can_read_the_document():
    command = [sys.executable, "-m", "mingle", "env", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_warnings_are_no_errors(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # of the tests themselves
    output.set_up()
    for quiet in (False, True):
        output.choose(quiet=quiet)
        logging.getLogger("mingle.test").warning("look out")
        logging.getLogger("mingle.test").error("too late")
        out = capsys.readouterr().out
        assert ("look out" in out) != quiet and "too late" in out


def follow(observer) -> None:
    """A merge of two tasks, with many steps in the first."""
    step = StepProgress(0, 100, 0.5, 0.25, 0.125)
    for place, count in enumerate((100, 1)):
        observer.merging("mingle", 0, place, ["one", "two"])
        for number in range(count):
            observer.adapting(step._replace(step=number))
    for pass_number in (1, 2):
        for done in range(1, 51):
            observer.streaming(PartsProgress(pass_number, done * 10**8, 5 * 10**9))
    observer.merged("mingle", 0, Result(["one", "two"], [[50.0], [40.0, 60.0]]))


def test_without_a_terminal_progress_is_lines(capsys, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) / 2)
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes no terminal of a file
    output.choose()
    with bars(1) as observer, stages("reading") as stage:
        follow(observer)
        stage("measuring one")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out and "\x1b[" not in out.replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert "mingle, order 1, task 1 of 2: one" in lines[0]
    assert "mingle, order 1, task 2 of 2: two" in "".join(lines)
    assert "mingle, order 1: ACC 50.0 %, BWT -10.0" in "".join(lines) and "measuring one" in lines[-1]
    steps = [line for line in lines if "adapting, step" in line]
    assert 3 <= len(steps) <= 7  # a line per ten of fifty seconds
    parts = [line for line in lines if "merging from files, pass" in line]
    assert 3 <= len(parts) <= 7 and " of 5.00 GB" in parts[0] and "pass 2" in parts[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_in_a_terminal_progress_is_bars(terminal, capsys, monkeypatch):
    """Also where only stderr is one, to which all but the document goes."""
    monkeypatch.setenv("TERM", "xterm")
    here, there = pty.openpty()
    with monkeypatch.context() as patch, open(there, "w") as file:
        patch.setattr(sys, "stderr" if terminal else "stdout", file)
        output.choose(json=True)
        with bars(1) as observer:
            follow(observer)
        with stages("reading") as stage:
            stage("measuring one")
        file.flush()
        os.set_blocking(here, False)
        try:
            drawn = os.read(here, 1 << 20).decode(errors="replace")
        except BlockingIOError:
            drawn = ""
    os.close(here)
    output.choose()
    assert ("━" in drawn, "\x1b[" in drawn) == (terminal, terminal)
    assert ("5.00 of 5.00 GB" in drawn) == terminal
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
