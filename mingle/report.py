"""What a person reads of a finished run: a table, a CSV file and plots, made of plain data.

`results` is ``results.json``: under ``methods`` and the method's name, per order of arrival, ``acc`` and ``bwt`` (per cent), ``seconds``,
``order`` (task names) and ``matrix`` (row i: accuracies after merging task i).  A missing number is None or NaN.

`traces` is ``traces.json``: under the name of a method that adapts, of its first order, ``order``, ``layers`` (by depth) and per task
``loss`` [steps], ``interference`` and ``strength`` {layer: [steps]} and ``gates`` [layers × experts].
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

#: what bounds the merging methods from below and above, but merges nothing
REFERENCES = ("pre-trained", "individual")

_COLUMNS = ("method", "ACC (%)", "BWT (%)", "seconds")
#: heat maps of more tasks carry no numbers
_MOST_NUMBERED = 10
# fmt: off
#: one colour per method in all plots: MINGLE's family warm, the others cool or muted, the references grey
_COLORS = {
    "pre-trained": "#999999", "individual": "#555555", "average": "#88CCEE", "task-arithmetic": "#4477AA", "ties": "#CC99BB",
    "magmax": "#AA4499", "consensus-ta": "#999933", "opcm": "#117733", "adamerging": "#44AA99", "wemoe": "#332288", "nufilt": "#111111",
    "mingle": "#CC3311", "mingle-light": "#EE9944", "mingle-seq": "#882255", "routed": "#0077BB",
}
_OTHER_COLOR = "#AA8855"
#: from first to last: tasks by arrival, blocks by depth
_FIRST_TO_LAST = ("#F2B04C", "#C8427E", "#26266B")
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "figure.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#E4E4E4", "lines.solid_capstyle": "butt",
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08, "savefig.dpi": 150, "savefig.bbox": "tight",
}
# fmt: on


def table(results: Mapping[str, Any]) -> Table:
    """Method × ACC and BWT (mean ± sample standard deviation over orders) and mean seconds; the best merging method is in bold."""
    from rich.table import Table

    out = Table(title=_caption(results))
    for column in _COLUMNS:
        out.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for reference, rows in itertools.groupby(_rows(results), key=lambda row: row[1]):
        for cells, _, best in rows:
            out.add_row(*cells, style="dim" if reference else "bold" if best else None)
        out.add_section()
    return out


def markdown_table(results: Mapping[str, Any]) -> str:
    """The same table as GitHub markdown: references in italics, the best merging method in bold."""
    lines = [_caption(results), "", f"| {' | '.join(_COLUMNS)} |", "|---|---:|---:|---:|"]
    for cells, reference, best in _rows(results):
        mark = "*" if reference else "**" if best else ""
        lines.append(f"| {' | '.join(f'{mark}{cell}{mark}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """One row per measured accuracy: orders count from 0, steps from 1, `after` is the task merged at that step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "order", "step", "after", "task", "accuracy"])
        for name, result in results["methods"].items():
            for order, (tasks, matrix) in enumerate(zip(result["order"], result["matrix"], strict=True)):
                for step, (after, row) in enumerate(zip(tasks, matrix, strict=True), start=1):
                    cells = zip(tasks, row, strict=True)
                    writer.writerows([name, order, step, after, task, value] for task, value in cells if _known(value))


def write_plots(results: Mapping[str, Any], traces: Mapping[str, Any], folder: Path) -> list[Path]:
    """The run's plots as PNG files in `folder`, which is made where it is missing; a plot without data is left out."""
    from matplotlib import style

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.context(_STYLE, after_reset=True):
        for name, figure in {
            "accuracy_matrix": _plot_matrices(results),
            "accuracy_over_tasks": _plot_accuracy(results),
            "gate_activation": _plot_gates(traces),
            "interference": _plot_interference(traces),
            "loss": _plot_loss(traces),
        }.items():
            if figure is not None:
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1])
    return written


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _number(value: float | None, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") if _known(value) else "–"  # + 0.0: no −0.0


def _mean(values: Sequence[float | None]) -> float:
    """NaN where any value is missing: a mean over the others would not be comparable."""
    known = [value for value in values if _known(value)]
    return statistics.fmean(known) if known and len(known) == len(values) else math.nan


def _mean_std(values: Sequence[float | None]) -> str:
    known = [value for value in values if _known(value)]
    return _number(_mean(values)) + (f" ± {_number(statistics.stdev(known))}" if len(known) == len(values) > 1 else "")


def _rows(results: Mapping[str, Any]) -> list[tuple[list[str], bool, bool]]:
    """(cells, whether a reference, whether the best merging method) of the table's rows, references first."""
    methods = {name: results["methods"][name] for name in sorted(results["methods"], key=lambda name: name not in REFERENCES)}
    means = {name: _mean(result["acc"]) for name, result in methods.items() if name not in REFERENCES}
    best = max(filter(_known, means.values()), default=None)
    rows = []
    for name, result in methods.items():
        cells = [name, _mean_std(result["acc"]), _mean_std(result["bwt"]), _number(_mean(result["seconds"]))]
        rows.append((cells, name in REFERENCES, name in means and means[name] == best))
    return rows


def _caption(results: Mapping[str, Any]) -> str:
    orders = max((len(result["acc"]) for result in results["methods"].values()), default=0)
    return f"suite {results['suite']}, protocol {results['protocol']}, {orders} order{'' if orders == 1 else 's'}"


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def _small_multiples(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes], int]:
    """A figure of so many panels of that size, the panels row by row, and how many there are in a row."""
    rows = math.ceil(count / math.ceil(math.sqrt(1.5 * count)))
    columns = math.ceil(count / rows)
    figure = _figure(columns * width + 2, rows * height + 1.2, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count], columns


def _heat_map(ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], digits: int | None, **style: Any) -> Any:
    """Values [rows, columns] as colours, NaN blank, and as numbers with so many digits where there are few; returns the image."""
    image = ax.imshow(values, **style)
    rotation, size = (45, 8) if len(columns) <= _MOST_NUMBERED else (90, 6.5)
    ax.set_xticks(range(len(columns)), columns, rotation=rotation, rotation_mode="anchor", ha="right", va="center", fontsize=size)
    ax.set_yticks(range(len(rows)), rows, fontsize=8 if len(rows) <= _MOST_NUMBERED else 6.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bright = image.to_rgba(values)[..., :3] @ (0.3, 0.6, 0.1) > 0.42
    for (i, j), value in np.ndenumerate(values):
        if digits is not None and len(columns) <= _MOST_NUMBERED and _known(value):
            ax.text(j, i, _number(value, digits), ha="center", va="center", fontsize=7, color="black" if bright[i, j] else "white")
    return image


def _first_to_last(figure: Figure, axes: Sequence[Axes], labels: Sequence[str], title: str) -> np.ndarray:
    """One colour for each of an ordered set, explained by a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    count = len(labels)
    colors = ScalarMappable(Normalize(-0.5, count - 0.5), LinearSegmentedColormap.from_list("", _FIRST_TO_LAST, count))
    bar = figure.colorbar(colors, ax=axes, label=title, aspect=30)
    bar.set_ticks(range(count), labels=labels)
    bar.ax.invert_yaxis()
    return colors.to_rgba(np.arange(count))


def _plot_matrices(results: Mapping[str, Any]) -> Figure | None:
    """Per method the accuracy on every task (column) after every merge (row), first order."""
    methods = {name: result for name, result in results["methods"].items() if name != "pre-trained" and result["matrix"]}
    if not methods:
        return None
    count = max(len(result["order"][0]) for result in methods.values())
    side = max(2.2, (0.36 if count <= _MOST_NUMBERED else 0.125) * count)
    title = f"Accuracy on every task after every merge, first order ({_caption(results)})"
    figure, axes, columns = _small_multiples(len(methods), side + 0.1, side + 0.5, title)
    for i, (ax, (name, result)) in enumerate(zip(axes, methods.items(), strict=True)):
        tasks, left, bottom = result["order"][0], i % columns == 0, i + columns >= len(methods)
        image = _heat_map(ax, np.array(result["matrix"][0], float), tasks, tasks, 0, cmap="viridis", vmin=0, vmax=100)
        ax.tick_params(labelleft=left, labelbottom=bottom)
        ax.set(xlabel="accuracy on task" if bottom else None, ylabel="after merging task" if left else None)
        ax.set_title(f"{name}: ACC {_number(result['acc'][0])}, BWT {_number(result['bwt'][0])}")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8, aspect=30)
    return figure


def _plot_accuracy(results: Mapping[str, Any]) -> Figure | None:
    """Mean accuracy over the tasks seen so far against their number, ± one standard deviation over orders."""
    curves = {  # [orders, T]
        name: np.array([[_mean(row[: i + 1]) for i, row in enumerate(matrix)] for matrix in result["matrix"]])
        for name, result in results["methods"].items()
    }
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve.sum(0)).any()}
    if not curves:
        return None
    figure = _figure(7.2, max(4.2, 0.2 * len(curves) + 2), f"Accuracy over the tasks seen so far ({_caption(results)})")
    ax = figure.subplots()
    ends = []
    for name, curve in curves.items():
        mean, x, color = curve.mean(0), np.arange(1, curve.shape[1] + 1), _COLORS.get(name, _OTHER_COLOR)
        width, dashes = 2.2 if name.startswith("mingle") else 1.4, "--" if name in REFERENCES else "-"
        ax.plot(x, mean, dashes, marker="o", markersize=3, color=color, linewidth=width, zorder=1 + width)
        if len(curve) > 1:
            std = curve.std(0, ddof=1)
            ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.1, linewidth=0)
        last = np.flatnonzero(np.isfinite(mean))[-1]
        ends.append((name, x[last], mean[last], color))
    ax.set(xlabel="merged tasks", ylabel="mean accuracy (%)")
    ax.locator_params(axis="x", integer=True)
    ax.grid(True)
    _label_ends(figure, ax, ends)
    return figure


def _label_ends(figure: Figure, ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write (name, x, y, colour) right of the axes, joined to the point (x, y)."""
    figure.draw_without_rendering()  # settles the layout, and so the height of the axes
    low, high = ax.get_ylim()
    gap = (high - low) * 11 / 72 * figure.dpi / ax.get_window_extent().height  # 11 points
    heights = _spread([y for _, _, y, _ in ends], gap, low, high)
    for (name, x, y, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            f"{name}  {_number(y)}",
            xy=(x, y),
            xytext=(1.04, height),
            textcoords=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2},
        )


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """The heights moved as little as possible to be at least `gap` apart within [low, high], in the same order.

    Less gap · rank this is isotonic regression: fit_i = max_{j ≤ i} min_{k ≥ i} mean(z_j … z_k).
    """
    order, steps = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    z = np.asarray(heights)[order] - steps
    fit = [max(min(z[j : k + 1].mean() for k in range(i, len(z))) for j in range(i + 1)) for i in range(len(z))]
    placed = np.empty(len(z))
    placed[order] = np.clip(fit, low, high - steps[-1]) + steps
    return placed


def _preferred(traces: Mapping[str, Any], key: str) -> str | None:
    """``mingle``, else the first method, of those that recorded `key`."""
    recorded = [name for name, trace in traces.items() if any(trace[key])]
    return "mingle" if "mingle" in recorded else next(iter(recorded), None)


def _plot_gates(traces: Mapping[str, Any]) -> Figure | None:
    """Left: every expert's gate on every task's samples.  Right: per layer, how far a task's own expert stands out."""
    name = _preferred(traces, "gates")
    if name is None:
        return None
    trace = traces[name]
    gates = np.array(trace["gates"], float)  # [tasks, layers, experts]
    count = gates.shape[2]
    owners = [task for task, loss in enumerate(trace["loss"]) if loss]  # a skipped task has no loss and no expert
    owners = owners if len(owners) == count else list(range(count))
    own = gates[owners, :, range(count)].T  # [layers, experts]
    selectivity = own - (gates[owners].sum(2).T - own) / max(count - 1, 1)

    tasks, experts = trace["order"], [trace["order"][owner] for owner in owners]
    layers = [re.sub(r"^\D*(\d+).*\.", r"\1 ", layer) for layer in trace["layers"]]  # encoder.layers.0.self_attn.q_proj → 0 q_proj
    height = max(2.6, 0.11 * len(layers), 0.14 * len(tasks)) + 1.5
    figure = _figure(11, height, f"{name}: gates after the last merge")
    left, right = figure.subplots(1, 2)
    bound = np.abs(gates.mean(1)).max()
    image = _heat_map(left, gates.mean(1), tasks, experts, 2, cmap="RdBu_r", aspect="auto", vmin=-bound, vmax=bound)
    left.set(title="Which expert answers to which task (mean over layers)", xlabel="expert of task", ylabel="samples of task")
    figure.colorbar(image, ax=left, label="mean gate value", aspect=40)
    bound = np.quantile(np.abs(selectivity), 0.98)  # a few extreme layers would wash out the rest
    image = _heat_map(right, selectivity, layers, experts, None, cmap="RdBu_r", aspect="auto", vmin=-bound, vmax=bound)
    right.set(title="Selectivity of every layer: own expert − mean of the others", xlabel="samples of task", ylabel="layer, by depth")
    figure.colorbar(image, ax=right, label="difference of mean gate values", aspect=40, extend="both", extendfrac=0.02)
    return figure


def _plot_interference(traces: Mapping[str, Any]) -> Figure | None:
    """S and λ of every layer over the adaptation steps of all tasks that had a basis, one after another."""
    name = _preferred(traces, "interference")
    if name is None:
        return None
    trace = traces[name]
    tasks = [task for task, layers in enumerate(trace["interference"]) if layers]
    starts = np.cumsum([0, *map(len, trace["loss"])]) + 0.5
    blocks = {layer: re.sub(r"^(\D*\d+).*", r"\1", layer) for layer in trace["layers"]}  # encoder.layers.0.mlp.fc1 → encoder.layers.0
    depths = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}

    figure = _figure(9.5, 5.4, f"{name}: interference with earlier tasks (thin: layers, thick: their mean)")
    axes = figure.subplots(2, 1, sharex=True)
    colors = _first_to_last(figure, axes, [str(depth) for depth in depths.values()], "depth (block)")
    for ax, key in zip(axes, ("interference", "strength"), strict=True):
        for task in tasks:
            ax.axvline(starts[task], color="#BBBBBB", linewidth=0.8)
            series, x = trace[key][task], np.arange(starts[task], starts[task + 1]) + 0.5
            for layer, values in series.items():
                ax.plot(x, values, color=colors[depths[blocks[layer]]], linewidth=0.6, alpha=0.7)
            ax.plot(x, np.mean(list(series.values()), 0), color="black", linewidth=2)
        ax.grid(True, axis="y")
    axes[0].set(ylabel="interference $S$", yscale="log", xlim=(starts[tasks[0]], starts[tasks[-1] + 1]))
    axes[1].set(ylabel="projection strength $\\lambda$", xlabel="adaptation step")
    top, crowded = axes[0].secondary_xaxis("top"), len(tasks) > _MOST_NUMBERED
    centres = [(starts[task] + starts[task + 1]) / 2 for task in tasks]
    top.set_xticks(centres, [trace["order"][task] for task in tasks], rotation=45 * crowded, ha="left" if crowded else "center")
    top.tick_params(length=0)
    return figure


def _plot_loss(traces: Mapping[str, Any]) -> Figure | None:
    """Per adapting method the loss over steps, one line per task."""
    methods = {name: trace for name, trace in traces.items() if any(trace["loss"])}
    if not methods:
        return None
    figure, axes, _ = _small_multiples(len(methods), 3.2, 2.8, "Loss during test-time adaptation")
    colors = _first_to_last(figure, axes, next(iter(methods.values()))["order"], "task, in order of arrival")
    for ax, (name, trace) in zip(axes, methods.items(), strict=True):
        for color, loss in zip(colors, trace["loss"], strict=True):
            ax.plot(range(1, len(loss) + 1), loss, color=color, linewidth=1.2)
        ax.set(title=name, xlabel="adaptation step", ylabel="loss")
        ax.grid(True)
    return figure
