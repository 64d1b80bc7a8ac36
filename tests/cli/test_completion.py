"""The scripts of ``mingle completion``, asked by the shells that they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mingle import cli
from mingle.cli import main
from mingle.methods import METHODS

#: what is typed → some of what is offered, all that begins with the last word
OFFERED = {
    "": {*cli.parsers()[1].choices},
    "demo --prot": {"--protocol"},
    "demo --methods ": {*METHODS},
    "eval x --suite clip-b32-1": {"clip-b32-14"},
    "reproduce ": {"main", "glue"},
    "add --vocabulary ": {"same", "base"},
    "bench --qui": {"--quick", "--quiet"},
    "inspect mer": {"merged"},
    "check ": {"merge.yaml", "merged"},
    "completion ": {"bash", "zsh", "fish"},
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merge.yaml").touch()
    (tmp_path / "merge.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(shell: str, place: Path, capsys) -> Path:
    assert main(["completion", shell]) == 0
    path = place.parent / f"script.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def ran(shell: str, *commands: str) -> list[list[str]]:
    """The lines that each command prints."""
    end = "; echo END; "
    done = subprocess.run([shell, "-c", end.join([*commands, ""])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return [part.strip("\n").split("\n") for part in done.stdout.split("END\n")[: len(commands)]]


def check(offered: list[list[str]]) -> None:
    for (typed, some), found in zip(OFFERED.items(), offered, strict=True):
        words = {word.rstrip("/") for word in found}
        assert some <= words, typed
        assert all(word.startswith(typed.rpartition(" ")[2]) for word in words), typed
        assert "merge.txt" not in words


def test_bash_completes(place, capsys):
    path = script("bash", place, capsys)

    def ask(typed: str) -> str:
        words = ["mingle", *typed.split(" ")]
        quoted = " ".join(f"'{word}'" for word in words)
        return (
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _shtab_mingle; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )

    _, *offered = ran("bash", f"source {path}", *map(ask, OFFERED))
    check(offered)


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish here")
def test_fish_completes(place, capsys):
    path = script("fish", place, capsys)
    _, *offered = ran("fish", f"source {path}", *(f'complete -C "mingle {typed}"' for typed in OFFERED))
    check([[line.partition("\t")[0] for line in lines] for lines in offered])


def test_zsh_reads_its_script(place, capsys):
    path = script("zsh", place, capsys)
    text = path.read_text()
    assert text.startswith("#compdef mingle\n")
    assert all(name in text for name in [*METHODS, *cli.parsers()[1].choices, "_files -/"])
    if shutil.which("zsh"):
        assert subprocess.run(["zsh", "-n", path], capture_output=True).returncode == 0


def test_without_the_package_it_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "error: completion needs the package shtab: pip install shtab\n" in capsys.readouterr().out
