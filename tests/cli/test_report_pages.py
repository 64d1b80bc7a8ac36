"""Commands that write ``report.html``: the last line says where, ``--open`` shows it."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
from fabricated_runs import comparison, merged, table
from merge_files import merge_file

from mingle.cli import main
from mingle.io import files

TASKS = ["digits", "letters"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """The addresses that a browser was asked for."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not addresses.append(address))
    return addresses


@pytest.mark.parametrize("make", [merged, lambda folder, names: table(folder, ["s"], ["average"], names)])
def test_report_makes_the_page_of_any_run_again(tmp_path, make, capsys, shown):
    folder = make(tmp_path / "a run", TASKS)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {folder}/report.html"
    assert shown == []
    before = (folder / "report.html").read_bytes()
    assert main(["report", str(folder), "--open"]) == 0
    assert shown == [f"file://{tmp_path}/a%20run/report.html"]
    assert (folder / "report.html").read_bytes() == before


def test_report_of_nothing_says_what_it_looks_for(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run; expected results.json of demo" in capsys.readouterr().out
    (comparison(tmp_path, TASKS) / "traces.json").unlink()
    assert main(["report", str(tmp_path)]) == 2
    assert "traces.json" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_a_machine_without_a_browser_is_told_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    assert main(["report", str(merged(tmp_path, TASKS)), "--open"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "no browser could be opened",
        f"report: {tmp_path}/report.html",
    ]


def test_merge_and_add_write_it(tmp_path, base_folder, tuned_folders, capsys, shown):
    config = merge_file(tmp_path, base_folder, {"a": tuned_folders[0], "<b>": tuned_folders[1]}, "average")
    out = tmp_path / "merged"
    assert main(["merge", str(config), "--out", str(out), "--open"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}/report.html"
    assert shown == [f"file://{out}/report.html"]
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>a" not in page and "Accuracy was not measured" in page
    assert json.loads((out / "timings.json").read_text())["seconds"].keys() == {"a", "<b>"}
    assert main(["add", str(out), "--name", "third", "--model", str(tuned_folders[2])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}/report.html"
    assert "third" in (out / "report.html").read_text()
    assert len(json.loads((out / "timings.json").read_text())["seconds"]) == 3


def test_several_orders_of_a_merge_have_one_page(tmp_path, base_folder, tuned_folders, capsys):
    experts = {"a": tuned_folders[0], "b": tuned_folders[1]}
    config = merge_file(tmp_path, base_folder, experts, "average", order={"shuffle": True, "seeds": [1, 2]})
    out = tmp_path / "merged"
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}/report.html"
    assert [path.parent for path in sorted(Path(out).rglob("report.html"))] == [out]
    assert "average, order-2" in (out / "report.html").read_text()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    folder = merged(tmp_path, TASKS)
    assert main(["report", str(folder)]) == 0
    before = (folder / "report.html").read_bytes()
    monkeypatch.setattr(files, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    assert main(["report", str(folder)]) == 2
    assert (folder / "report.html").read_bytes() == before
