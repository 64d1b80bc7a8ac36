"""What commands and model cards say of accuracy where nobody names the task."""

from __future__ import annotations

import io
import json

import pytest
from classifiers import NAMES, inputs, made, tuned
from rich.console import Console

import mingle
from mingle.cli import main
from mingle.cli.output import result_table
from mingle.merging.evaluate import Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classifiers merged; the second has 62.5 % where its task is known, and 12.5 % where it is not."""
    base, folder = made("bert"), tmp_path_factory.mktemp("merged")
    merger = mingle.Merger(base, "average")
    for number, names in enumerate(NAMES):
        merger.add(f"task {number}", tuned(base, names, number + 1), inputs(base))
    merger.matrix = [[50.0], [37.5, 62.5]]
    merger.unknown = [[50.0], [25.0, 12.5]]
    merger.save_pretrained(folder)
    return folder


def printed(table):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_of_a_result_has_a_column_for_unknown_tasks_where_they_were_measured(folder):
    result = mingle.Merger.from_pretrained(folder).result()
    text = printed(result_table(result))
    assert "ACC 50.0 % (task unknown 18.8 %), BWT −12.5" in text.replace("-", "−")
    assert "now, task unknown" in text and "12.5 %" in text
    without = printed(result_table(Result(result.tasks, result.matrix, [[None], [None, None]])))
    assert "unknown" not in without and "ACC 50.0 %, BWT" in without


def test_inspect_and_the_model_card_show_both(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "unknown" in text
    assert "62.5 %" in text and "12.5 %" in text
    assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--task", "task 1"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "| task | accuracy when merged | accuracy now | now, task unknown |" in card
    assert "| task 1 | 62.5 % | 62.5 % | 12.5 % |" in card
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {
        str(number): name for number, name in enumerate(NAMES[1])
    }
