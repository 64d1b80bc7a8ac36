"""The report of a finished run: numbers in the table and the CSV file to the letter, plots that exist and
show something.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mingle.io.files import CheckpointError, without_nan
from mingle.runs import report
from mingle.runs.report import canvas, plots

TASKS = ["digits", "letters", "rings", "stripes"]
LAYERS = [f"encoder.layers.{block}.{leaf}" for block in range(2) for leaf in ("self_attn.q_proj", "mlp.fc1")]
STEPS = 6
ALL_PLOTS = ["accuracy_matrix", "accuracy_over_tasks", "gate_activation", "interference", "loss"]


def method(
    acc: list[float | None],
    bwt: list[float | None],
    matrices: list[list[list[float | None]]],
    tasks: list[str],
) -> dict[str, Any]:
    return {
        "acc": acc,
        "bwt": bwt,
        "matrix": matrices,
        "order": [tasks] * len(acc),
        "seconds": [1.5] * len(acc),
    }


@pytest.fixture
def small() -> dict[str, Any]:
    """Two tasks, two orders; every number is chosen by hand."""
    pair = TASKS[:2]
    matrix = [[90.0, None], [80.0, 70.25]]
    methods = {
        "average": method(
            [60.0, 61.0],
            [-4.0, -3.0],
            [[[70.0, None], [None, 60.0]], [[70.0, None], [62.0, float("nan")]]],
            pair,
        ),
        "individual": method([95.0, 95.0], [0.0, -0.0], [matrix, matrix], pair),
        "mingle": method([75.0, 77.0], [-1.0, 0.5], [matrix, matrix], pair),
        "opcm": method([99.0, None], [float("nan"), -2.0], [matrix, matrix], pair),
        "pre-trained": method([40.0, 40.0], [0.0, 0.0], [matrix, matrix], pair),
    }
    return {"suite": "glyphs4", "protocol": "strict", "seed": 0, "versions": {}, "methods": methods}


def fabricate(orders: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and traces of four tasks, as json files would give them back."""
    rng = np.random.default_rng(0)
    count, methods = len(TASKS), {}
    for name in ("pre-trained", "individual", "average", "mingle", "mingle-light"):
        cells = rng.uniform(40, 95, (orders, count, count))
        matrices = [
            [[row[j] if j <= i else None for j in range(count)] for i, row in enumerate(matrix)]
            for matrix in cells.tolist()
        ]
        methods[name] = method(cells[:, -1].mean(1).tolist(), [-1.0] * orders, matrices, TASKS)
    traces = {}
    for name in ("mingle-light", "mingle"):
        series = [
            {layer: np.geomspace(1e-4, rng.uniform(0.01, 0.4), STEPS).tolist() for layer in LAYERS}
            for _ in TASKS[1:]
        ]
        traces[name] = {
            "order": TASKS,
            "layers": LAYERS,
            "loss": rng.uniform(1, 3, (count, STEPS)).tolist(),
            "interference": [{}, *series],
            "strength": [
                {},
                *({layer: np.exp(-np.array(s)).tolist() for layer, s in task.items()} for task in series),
            ],
            "gates": rng.normal(0, 0.2, (count, len(LAYERS), count)).tolist(),
        }
    results = {"suite": "glyphs4", "protocol": "strict", "seed": 0, "versions": {}, "methods": methods}
    return json.loads(json.dumps(results)), json.loads(json.dumps(traces))


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def render(results: dict[str, Any]) -> str:
    console = Console(
        record=True, width=120, force_terminal=True, color_system="standard", file=io.StringIO()
    )
    console.print(report.table(results))
    return console.export_text(styles=True)


def test_csv_has_one_row_per_measured_cell(small: dict[str, Any], tmp_path: Path) -> None:
    small["methods"] = {name: small["methods"][name] for name in ("average", "mingle")}
    report.write_csv(small, tmp_path / "accuracy_matrix.csv")
    assert (tmp_path / "accuracy_matrix.csv").read_bytes().decode() == (
        "method,order,step,after,task,accuracy\n"
        "average,0,1,digits,digits,70.0\n"
        "average,0,2,letters,letters,60.0\n"
        "average,1,1,digits,digits,70.0\n"
        "average,1,2,letters,digits,62.0\n"
        "mingle,0,1,digits,digits,90.0\n"
        "mingle,0,2,letters,digits,80.0\n"
        "mingle,0,2,letters,letters,70.25\n"
        "mingle,1,1,digits,digits,90.0\n"
        "mingle,1,2,letters,digits,80.0\n"
        "mingle,1,2,letters,letters,70.25\n"
    )


def test_markdown_numbers(small: dict[str, Any]) -> None:
    assert report.markdown_table(small) == (
        "suite glyphs4, protocol strict, 2 orders\n"
        "\n"
        "| method | ACC (%) | BWT (%) | seconds |\n"
        "|---|---:|---:|---:|\n"
        "| *individual* | *95.0 ± 0.0* | *0.0 ± 0.0* | *1.5* |\n"
        "| *pre-trained* | *40.0 ± 0.0* | *0.0 ± 0.0* | *1.5* |\n"
        "| average | 60.5 ± 0.7 | −3.5 ± 0.7 | 1.5 |\n"
        "| **mingle** | **76.0 ± 1.4** | **−0.2 ± 1.1** | **1.5** |\n"
        "| opcm | – | – | 1.5 |\n"
    )


def test_table_shows_means_deviations_and_gaps(small: dict[str, Any]) -> None:
    lines = render(small).splitlines()
    row = {name: next(line for line in lines if name in line) for name in small["methods"]}
    assert "suite glyphs4, protocol strict, 2 orders" in "".join(lines)
    assert "60.5 ± 0.7" in row["average"]
    assert "−3.5 ± 0.7" in row["average"]
    assert "76.0 ± 1.4" in row["mingle"]
    assert row["opcm"].count("–") == 2
    rule = next(i for i, line in enumerate(lines) if "├" in line)
    assert all((name in report.REFERENCES) == (lines.index(line) < rule) for name, line in row.items())


def measured_unknown(results: dict[str, Any]) -> dict[str, Any]:
    """The same results with those of unknown tasks, for `average` alone."""
    for name, result in results["methods"].items():
        count, known = len(result["acc"]), name == "average"
        result["acc_unknown"] = [20.0, 30.0][:count] if known else [None] * count
        result["unknown"] = [
            [[value and value / 2 if known else None for value in row] for row in matrix]
            for matrix in result["matrix"]
        ]
    return results


def test_accuracy_of_unknown_tasks_stands_beside_that_of_known_ones(
    small: dict[str, Any], tmp_path: Path
) -> None:
    results = measured_unknown(small)
    lines = report.markdown_table(results).splitlines()
    assert lines[2] == "| method | ACC (%) | task unknown (%) | BWT (%) | seconds |"
    assert lines[3] == "|---|---:|---:|---:|---:|"
    assert "| average | 60.5 ± 0.7 | 25.0 ± 7.1 | −3.5 ± 0.7 | 1.5 |" in lines
    assert "| **mingle** | **76.0 ± 1.4** | **–** | **−0.2 ± 1.1** | **1.5** |" in lines
    assert "task unknown" in render(results)
    report.write_csv(results, tmp_path / "accuracy_matrix.csv")
    rows = (tmp_path / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[:2] == [
        "method,order,step,after,task,accuracy,task_unknown",
        "average,0,1,digits,digits,70.0,35.0",
    ]
    assert "mingle,0,1,digits,digits,90.0," in rows
    for name, value in (("results.json", results), ("traces.json", {})):
        (tmp_path / name).write_text(json.dumps(without_nan(value)))
    assert report.read(tmp_path)[0]["methods"]["average"]["acc_unknown"] == [20.0, 30.0]
    results["methods"]["average"]["unknown"].pop()
    (tmp_path / "results.json").write_text(json.dumps(without_nan(results)))
    with pytest.raises(CheckpointError, match="unknown: expected one value for each of 2 orders, found 1"):
        report.read(tmp_path)


@pytest.mark.filterwarnings("error")
def test_known_and_unknown_tasks_are_plotted_where_both_were_measured(tmp_path: Path) -> None:
    results, traces = fabricate()
    paths = report.write_plots(measured_unknown(results), traces, tmp_path)
    assert [path.stem for path in paths] == [*ALL_PLOTS[:2], "task_known_or_unknown", *ALL_PLOTS[2:]]
    figure = plots._plot_unknown(results)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["average"]
    known, unknown = figure.axes[0].lines[0].get_xdata()
    assert known == pytest.approx(np.mean(results["methods"]["average"]["acc"]))
    assert unknown == pytest.approx(25)


def test_only_the_best_merging_method_is_bold(small: dict[str, Any]) -> None:
    bold = [line for line in render(small).splitlines() if "\x1b[1m" in line and "│" in line]
    assert [line.count("mingle") for line in bold] == [1]


def test_one_order_has_no_deviation_and_negative_zero_no_sign() -> None:
    only = method([50.04], [-0.04], [[[50.04]]], ["digits"])
    results = {"suite": "s", "protocol": "official", "seed": 0, "versions": {}, "methods": {"average": only}}
    assert report.markdown_table(results).endswith("| **average** | **50.0** | **0.0** | **1.5** |\n")
    assert "1 order" in render(results)
    assert "±" not in render(results)


@pytest.mark.filterwarnings("error")
def test_all_plots_are_written_and_show_something(tmp_path: Path) -> None:
    paths = report.write_plots(*fabricate(), tmp_path / "new" / "plots")
    assert [path.stem for path in paths] == ALL_PLOTS
    for path in paths:
        image = pixels(path)
        assert 400 < image.shape[0] < 2000, path
        assert 700 < image.shape[1] < 3000, path
        assert len(np.unique(image @ np.array([1.0, 2.0, 4.0]))) > 50, path
        assert 0.02 < (image < 0.98).any(-1).mean() < 0.9, path


@pytest.mark.filterwarnings("error")
def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    results, traces = fabricate()
    assert [path.stem for path in report.write_plots(results, {}, tmp_path)] == ALL_PLOTS[:2]
    traces = {"adamerging": traces["mingle"] | {"interference": [{}] * 4, "strength": [{}] * 4, "gates": []}}
    assert [path.stem for path in report.write_plots(results, traces, tmp_path)] == [*ALL_PLOTS[:2], "loss"]
    assert report.write_plots(results | {"methods": {}}, {}, tmp_path) == []


@pytest.mark.filterwarnings("error")
def test_plots_bear_missing_accuracies(tmp_path: Path) -> None:
    results, traces = fabricate()
    for result in results["methods"].values():  # only the last row was measured, and not for all
        result["matrix"] = [[[None] * 4 for _ in TASKS[:-1]] + [matrix[-1]] for matrix in result["matrix"]]
    results["methods"]["average"]["matrix"][0][-1][2] = float("nan")
    results["methods"]["average"]["acc"] = [None, float("nan")]
    assert len(report.write_plots(results, traces, tmp_path)) == len(ALL_PLOTS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 12])
def test_plots_of_one_task_and_of_many(count: int, tmp_path: Path) -> None:
    tasks = [f"task {i}" for i in range(count)]
    matrix = [[50.0 + j if j <= i else None for j in range(count)] for i in range(count)]
    series = [{layer: [0.1, 0.2] for layer in LAYERS} if i else {} for i in range(count)]
    trace = {
        "order": tasks,
        "layers": LAYERS,
        "loss": [[2.0, 1.0]] * count,
        "interference": series,
        "strength": series,
    }
    trace["gates"] = np.full((count, len(LAYERS), count), 0.5).tolist()
    results = {
        "suite": "s",
        "protocol": "strict",
        "seed": 0,
        "versions": {},
        "methods": {"new": method([50.0], [0.0], [matrix], tasks)},
    }
    written = [path.stem for path in report.write_plots(results, {"new": trace}, tmp_path)]
    assert written == [name for name in ALL_PLOTS if count > 1 or name != "interference"]


def test_gate_maps_skip_the_task_that_left_no_expert() -> None:
    _, traces = fabricate()
    trace = traces["mingle"]
    trace["loss"][1] = []
    gates = np.random.default_rng(1).normal(size=(4, len(LAYERS), 3))  # [tasks, layers, experts]
    trace["gates"] = gates.tolist()
    figure = plots._plot_gates(traces)
    overview, selectivity = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[:2])
    np.testing.assert_allclose(overview, gates.mean(1))
    np.testing.assert_allclose(selectivity[:, 1], gates[2, :, 1] - gates[2][:, [0, 2]].mean(1))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["digits", "rings", "stripes"]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == [
        "0 q_proj",
        "0 fc1",
        "1 q_proj",
        "1 fc1",
    ]


def test_label_heights_keep_their_distance_and_order() -> None:
    heights = [50.0, 50.2, 80.0, 49.9, 99.5, 99.6]
    placed = canvas.spread(heights, 3.0, 0.0, 100.0)
    assert np.argsort(placed).tolist() == np.argsort(heights).tolist()
    assert np.diff(np.sort(placed)).min() >= 3.0 - 1e-9
    assert placed.min() >= 0
    assert placed.max() <= 100
    assert placed[2] == 80.0
    np.testing.assert_allclose(placed[[3, 0, 1]].mean(), np.mean([49.9, 50.0, 50.2]))


def test_colours_tell_methods_apart() -> None:
    assert len(set(canvas.COLORS.values())) == len(canvas.COLORS)


def test_import_loads_no_matplotlib() -> None:
    code = "import sys, mingle.runs.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
