"""What a command refuses, and what is in a folder that it writes to."""

from __future__ import annotations

from pathlib import Path

from mingle.cli import main


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
