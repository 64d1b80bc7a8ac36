"""Names that mean something to a terminal, Markdown, a spreadsheet or Matplotlib are shown as they are."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from mingle.cli import main, output
from mingle.cli.progress import bars
from mingle.runs import report
from mingle.suites import glyphs
from mingle.suites.glyphs.tasks import SUITES
from mingle.text import csv_cell, markdown_cell, plot_label, visible

#: name → how a terminal shows it
NAMES = {
    "digits[small]": "digits[small]",
    "day[/night]": "day[/night]",
    "[bold red]x[/]": "[bold red]x[/]",
    ":smile: {0} %s": ":smile: {0} %s",
    "a$b$c $\\frac{": "a$b$c $\\frac{",
    "escape\x1b[31m": "escape\\x1b[31m",
    "bell\a and\r\nlines": "bell\\x07 and\\r\\nlines",
    "turned\u202eround": "turned\\u202eround",
    "a|b, \"c\" <i>&amp;": "a|b, \"c\" <i>&amp;",
    "=1+1": "=1+1",
}  # fmt: skip
FOLDER = "models [v2] [/x] :cat: \x1b[2J"
SHOWN = FOLDER.replace("\x1b", "\\x1b")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setattr(output.console, "_width", 400)


@pytest.fixture
def place(tmp_path, base_folder, tuned_folders) -> Path:
    """A folder of a hostile name with a base and a model of hostile names in it."""
    folder = tmp_path / FOLDER
    shutil.copytree(base_folder, folder / "base[0]")
    shutil.copytree(tuned_folders[0], folder / "tuned[1]")
    return folder


def write_config(place: Path, names, **changes) -> Path:
    content = {
        "base": str(place / "base[0]"),
        "method": "average",
        "experts": [{"name": name, "model": str(place / "tuned[1]")} for name in names],
    } | changes
    path = place / "merge[a].yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def printed(capsys, code: int, *arguments: object) -> str:
    """What a command prints, nothing of which steers the terminal."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert visible(out, keep="\n") == out
    assert "\x1b" not in err
    return out


def test_merge_check_add_eval_inspect_and_export_show_them(place, capsys):
    config, out = write_config(place, NAMES), place / "merged[out]"
    assert f"{SHOWN}/merge[a].yaml: all {len(NAMES)} experts fit" in printed(capsys, 0, "check", config)
    text = printed(capsys, 0, "merge", config, "--out", out)
    assert f"{SHOWN}/merged[out]" in text
    assert all(shown in text for shown in NAMES.values())
    new = "added[/]"
    assert new in printed(capsys, 0, "add", out, "--name", new, "--model", place / "tuned[1]")
    text = printed(capsys, 0, "inspect", out)
    assert f"{SHOWN}/merged[out]: average, {len(NAMES) + 1} tasks" in text
    assert all(shown in text for shown in [*NAMES.values(), new])
    assert f"{SHOWN}/plain[x]" in printed(capsys, 0, "export", out, "--out", place / "plain[x]")
    assert "suite: name one" in printed(capsys, 2, "eval", out)
    text = printed(capsys, 2, "eval", out, "--suite", place / "no[suite]")
    assert "no[suite]" in text
    assert [task["name"] for task in json.loads((out / "manifest.json").read_text())["tasks"]] == [
        *NAMES,
        new,
    ]


def test_errors_show_them(place, capsys):
    missing = place / "missing[v2][/b]"

    def refusal(*arguments) -> str:
        text = printed(capsys, 2, *arguments)
        assert "error: " in text
        return text

    gone = f"{SHOWN}/missing[v2][/b]"
    experts = [{"name": "a", "model": str(missing)}]
    assert gone in refusal("check", write_config(place, [], experts=experts))
    assert gone in refusal("check", missing)
    assert gone in refusal("merge", missing, "--out", place / "x")
    assert gone in refusal("inspect", missing)
    assert gone in refusal("eval", missing)
    assert gone in refusal("add", missing, "--name", "[a]", "--model", "[b]")
    assert gone in refusal("export", missing, "--out", place / "x")
    assert gone in refusal("report", missing)
    assert "[red]" in refusal("demo", "--methods", "[red]", "--out", place / "x")
    assert "[red]" in refusal("demo", "--suite", "[red]", "--out", place / "x")
    assert "[red]=1" in refusal("demo", "--set", "[red]=1", "--out", place / "x").replace(":", "=1")
    assert "[red]" in refusal("reproduce", "[red]")
    assert "[red]" in refusal("reproduce", "main", "--suite", "[red]", "--out", place / "x")
    twice = "two of them are called '[x]'"
    assert twice in refusal("check", write_config(place, ["[x]", "[x]"]))


def test_shapes_and_indices_of_our_own_wording_are_shown(place, capsys):
    assert "experts[0]: 'model' is missing" in printed(
        capsys, 2, "check", write_config(place, [], experts=[{"name": "a"}])
    )
    weights = place / "tuned[1]" / "model.safetensors"
    tensors = load_file(weights)
    tensors["vision_model.post_layernorm.bias"] = torch.zeros(3)
    save_file(tensors, weights, {"format": "pt"})
    text = printed(capsys, 2, "check", write_config(place, ["a"]))
    assert "post_layernorm.bias [3] instead of [32]" in text


def test_arguments_that_cannot_be_parsed_are_shown(capsys):
    for arguments in (
        ["env", "\x1b[31m[x]"],
        ["bench", "--case", "[x]\x1b"],
        ["bench", "--compare", "[x]\x1b"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert "[x]" in err and "\\x1b" in err and "\x1b" not in err


def test_a_suite_of_own_images_in_hostile_folders(tmp_path, capsys):
    """Task and class folders, and a name that is not UTF-8."""
    from PIL import Image

    task = SUITES["glyphs4"][0]
    name, images = "glyphs[a] \x1b[1m", tmp_path / FOLDER / os.fsdecode(b"images\xff")
    pictures, labels = task.test_set(2)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = images / name / f"{task.class_names[label]} [b]"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    config = write_config(
        tmp_path, [], base=str(glyphs.BASE), eval={"batch_size": 8},
        experts=[{"name": name, "model": str(glyphs.DATA / "experts" / task.name)}],
    )  # fmt: skip
    out = tmp_path / "merged"
    assert main(["merge", str(config), "--out", str(out)]) == 0
    assert "glyphs[a] \\x1b[1m" in printed(
        capsys, 0, "eval", out, "--suite", images, "--samples-per-class", "1"
    )
    broken = images / name / "empty[b]"
    broken.mkdir()
    text = printed(capsys, 2, "eval", out, "--suite", images, "--samples-per-class", "1")
    assert f"{SHOWN}/images\\udcff/glyphs[a] \\x1b[1m/empty[b]: no images in it" in text


def fabricated(names: list[str], suite: str = "suite [x] $\\frac{") -> tuple[dict, dict]:
    """What a demo of two methods leaves, with tasks and methods of those names."""
    count, layers = len(names), ["encoder.layers.0.mlp.fc1", "[x]$\\frac{"]
    matrix = [[50.0 + j if j <= i else None for j in range(count)] for i in range(count)]
    rows = {"acc": [50.0], "bwt": [0.0], "seconds": [1.0], "order": [names], "matrix": [matrix]}
    series = [{layer: [0.1, 0.2] for layer in layers} if i else {} for i in range(count)]
    gates = [[[0.5 + i + j for j in range(count)] for _ in layers] for i in range(count)]
    trace = dict(order=names, layers=layers, loss=[[2.0, 1.0]] * count, gates=gates)
    trace |= dict(interference=series, strength=series)
    methods = dict.fromkeys(("average", *names[:2]), rows)
    return {"suite": suite, "protocol": "[p]", "methods": methods}, {names[0]: trace}


@pytest.mark.slow
def test_demo_and_reproduce_show_where_they_write(few_images, tmp_path, capsys):
    folder, few = tmp_path / FOLDER, ("--suite", "glyphs4", "--methods", "average")
    assert f"{SHOWN}/demo[1]" in printed(capsys, 0, "demo", *few, "--out", folder / "demo[1]")
    assert f"{SHOWN}/table[1]" in printed(capsys, 0, "reproduce", "main", *few, "--out", folder / "table[1]")


def test_report_shows_them_in_table_csv_and_plots(tmp_path, capsys):
    results, traces = fabricated(list(NAMES))
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "traces.json").write_text(json.dumps(traces))
    text = printed(capsys, 0, "report", folder)
    assert "digits[small]" in text and "day[/night]" in text and "protocol [p]" in text
    assert len(list(folder.glob("*.png"))) == 5
    with open(folder / "accuracy_matrix.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {row[4] for row in rows[1:]} == {"'=1+1" if n == "=1+1" else shown for n, shown in NAMES.items()}
    assert {len(row) for row in rows} == {6}


def test_the_report_s_tables_need_no_console_of_ours():
    results, _ = fabricated(["[bold red]x[/]", "day[/night]"])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 – closed with it
    console.print(report.table(results))
    text = console.export_text()
    console.file.close()
    assert "[bold red]x[/]" in text and "day[/night]" in text and "suite [x]" in text


def test_labels_of_plots_show_the_text_itself(tmp_path):
    results, _ = fabricated(list(NAMES))
    figure = report.plots._plot_matrices(results)
    figure.canvas.draw()
    for label, shown in zip(figure.axes[0].get_yticklabels(), NAMES.values(), strict=True):
        text, is_math = label._preprocess_math(label.get_text())
        assert (text, is_math) == (shown, False)
    assert len(plot_label("x" * 10_000)) < 70


def test_markdown_and_csv_cells_hold_one_line_of_plain_text():
    assert markdown_cell("a|b") == r"a\|b"
    assert markdown_cell("[x](y) *b* `c` <i> _d_ e_f") == r"\[x\](y) \*b\* \`c\` \<i\> \_d\_ e_f"
    assert markdown_cell("two\nlines") == r"two\\nlines"
    assert [csv_cell(text) for text in ("=x", "+x", "-x", "@x", "x=", "\tx")] == [
        "'=x", "'+x", "'-x", "'@x", "x=", "\\tx"
    ]  # fmt: skip


def test_reproduce_shows_labels_in_table_and_markdown(tmp_path, capsys):
    """A row's label and a suite's name reach the terminal, `table.md` and the plots."""
    spread = {"mean": 50.0, "std": None, "values": [50.0]}
    cell = dict(
        acc=spread,
        bwt=spread,
        published=None,
        difference=None,
        seconds=1.0,
        finished=[42],
        failed={},
        folders=["x"],
    )
    label = "γ [/x] $\\frac{ | \x1b"
    row = dict(label=label, method="mingle", options={}, series="[s]", value=1, cells={"s[1]": cell})
    part = dict(protocol="[p]", suites=["s[1]"], rows=[row])
    summary = dict(table="[t]", title="a|b", axis=None, orders=1, set={"[k]": "[v]"}, tables=[part])
    for table in report.comparison.tables(summary):
        output.console.print(table)
    text = capsys.readouterr().out
    assert "γ [/x] $\\frac{ | \\x1b" in text and "s[1]" in text and "[k]=[v]" in text and "\x1b" not in text
    lines = report.comparison.markdown(summary).splitlines()
    assert r"γ \[/x\] \$\\frac{ \| \\x1b" in lines[-1 if lines[-1] else -2]
    assert [path.name for path in report.sweeps.write_plots(summary, {}, tmp_path)] == ["s[1]-[p]-bars.png"]


def test_progress_and_log_show_them(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # of the tests themselves
    monkeypatch.setattr(output.console, "_width", 400)
    output.set_up()
    with bars(1) as observer:
        observer.merging("average", 0, 0, ["[bold]t[/] \x1b[2J"])
        observer.training("[red]expert[/] \x1b[2J", 1, 2)
        logging.getLogger("mingle.test").warning("[/x] of %s", "\x1b[2J")
    text = capsys.readouterr().out
    assert "[bold]t[/] \\x1b[2J" in text
    assert "[red]expert[/] \\x1b[2J" in text
    assert "[/x] of \\x1b[2J" in text and "\x1b" not in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_output_will_do(place, encoding, tmp_path, monkeypatch):
    config, name = write_config(place, ["naïve [ж] –"]), os.fsdecode(b"out\xff[1]")
    written = io.BytesIO()
    monkeypatch.setenv("COLUMNS", "200")
    with io.TextIOWrapper(written, encoding=encoding) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["merge", str(config), "--out", str(tmp_path / name)]) == 0
        stdout.flush()
        found = written.getvalue()
    assert b"out\\udcff[1]" in found
    shown = {"ascii": rb"na\xefve [\u0436] \u2013", "latin-1": b"na\xefve [\\u0436] \\u2013"}
    assert shown.get(encoding, "naïve [ж] –".encode()) in found
    assert (tmp_path / name / "manifest.json").exists()
