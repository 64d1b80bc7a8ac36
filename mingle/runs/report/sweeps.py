"""The plots of `mingle.runs.reproduce`: ACC and BWT by row or swept quantity, and gates for its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mingle.runs.report.canvas import (
    COLORS,
    MOST_NUMBERED,
    OTHER_COLOR,
    STYLE,
    figure_of,
    heat_map,
    small_multiples,
)
from mingle.runs.report.numbers import REFERENCES, number
from mingle.text import plot_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEASURES = {"acc": "ACC (%)", "bwt": "BWT (points)"}
#: colours of curves that are not methods
_PALETTE = ("#CC3311", "#EE9944", "#0077BB", "#117733", "#332288", "#AA4499")
_MARKERS = "osD^vP"
#: the most rows whose gates are shown
_MOST_GATES = 12


def write_plots(summary: Mapping[str, Any], traces: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write PNG files for each suite and protocol to `folder`, and return their paths.

    A plot without data is left out.

    Args:
        summary: ``table.json``.
        traces: protocol → suite → row label → ``trace.json`` of the first order.
        folder: an existing folder.
    """
    from matplotlib import style

    written = []
    with style.context(STYLE, after_reset=True):
        for part in summary["tables"]:
            for suite in part["suites"]:
                rows = [
                    row
                    for row in part["rows"]
                    if suite in row["cells"] and row["cells"][suite]["acc"]["values"]
                ]
                recorded = {
                    label: trace
                    for label, trace in traces.get(part["protocol"], {}).get(suite, {}).items()
                    if trace
                }
                where = f"{summary['table']}, {suite}, protocol {part['protocol']}"
                if summary["axis"]:
                    figures = {
                        "curves": _plot_curves(rows, suite, summary["axis"], where),
                        "gates": _plot_gates(recorded, where),
                    }
                else:
                    figures = {"bars": _plot_bars(rows, suite, where)}
                for name, figure in figures.items():
                    if figure is not None:
                        written.append(folder / f"{suite}-{part['protocol']}-{name}.png")
                        figure.savefig(written[-1])
    return written


def _plot_curves(rows: Sequence[Mapping[str, Any]], suite: str, axis: str, where: str) -> Figure | None:
    """ACC (left) and BWT (right) ± one standard deviation over orders, one curve per series.

    The swept values stand at equal distances.
    """
    if not rows:
        return None
    values = sorted({row["value"] for row in rows})
    series = list(dict.fromkeys(row["series"] for row in rows))
    figure = figure_of(8.2, 3.4, where)
    panels = figure.subplots(1, 2)
    for ax, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        for i, name in enumerate(series):
            own = [row for row in rows if row["series"] == name]
            aside = 0.06 * (i - (len(series) - 1) / 2)  # so that error bars do not cover each other
            x = [values.index(row["value"]) + aside for row in own]
            spread = [row["cells"][suite][measure] for row in own]
            color = COLORS.get(name, _PALETTE[i % len(_PALETTE)])
            ax.errorbar(
                x,
                [s["mean"] for s in spread],
                [s["std"] or 0.0 for s in spread],
                color=color,
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.6,
                elinewidth=1,
                capsize=2.5,
                label=plot_label(name),
            )
        ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        ax.set(xlabel=axis, ylabel=label)
        ax.grid(True, axis="y")
    if len(series) > 1:
        # beside the curves, never over them
        panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _plot_bars(rows: Sequence[Mapping[str, Any]], suite: str, where: str) -> Figure | None:
    """ACC (left) and BWT (right) ± one standard deviation over orders, one bar per row, references on top."""
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: row["method"] not in REFERENCES)
    figure = figure_of(9.4, 0.28 * len(rows) + 1.3, where)
    panels = figure.subplots(1, 2, sharey=True)
    colors = [COLORS.get(row["method"], OTHER_COLOR) for row in rows]
    for ax, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        spread = [row["cells"][suite][measure] for row in rows]
        means, errors = [s["mean"] for s in spread], [s["std"] or 0.0 for s in spread]
        ax.barh(
            range(len(rows)),
            means,
            xerr=errors,
            height=0.7,
            color=colors,
            error_kw={"elinewidth": 1, "ecolor": "#222222"},
        )
        for y, (mean, error) in enumerate(zip(means, errors, strict=True)):
            side = -1 if mean < 0 else 1
            ax.annotate(
                number(mean),
                (mean + side * error, y),
                (4 * side, 0),
                textcoords="offset points",
                va="center",
                ha="right" if side < 0 else "left",
                fontsize=8,
            )
        ax.set_yticks(range(len(rows)), [plot_label(row["label"]) for row in rows])
        ax.tick_params(axis="y", length=0)
        ax.use_sticky_edges = False  # otherwise numbers at 0 would stand outside
        ax.margins(x=0.16)
        ax.set(xlabel=label)
        ax.grid(True, axis="x")
        ax.axvline(0, color="#666666", linewidth=0.8)
    panels[0].set_xlim(left=0)
    panels[0].invert_yaxis()
    return figure


def _plot_gates(traces: Mapping[str, Mapping[str, Any]], where: str) -> Figure | None:
    """For each value, the gate of every expert (column) on every task's samples (row), mean over layers.

    All panels share one colour scale.
    """
    if not 1 < len(traces) <= _MOST_GATES:
        return None
    # [tasks, experts]
    gates = {label: np.array(trace["gates"], float).mean(1) for label, trace in traces.items()}
    count = max(len(values) for values in gates.values())
    side = max(2.0, (0.3 if count <= MOST_NUMBERED else 0.125) * count)
    figure, axes, columns = small_multiples(
        len(gates), side + 0.2, side + 0.5, f"Gates after the last merge, first order ({where})"
    )
    bound = max(np.abs(values).max() for values in gates.values())
    for i, (ax, (label, values)) in enumerate(zip(axes, gates.items(), strict=True)):
        tasks = traces[label]["order"]
        left, bottom = i % columns == 0, i + columns >= len(gates)
        image = heat_map(
            ax, values, tasks, tasks[: values.shape[1]], 2, cmap="RdBu_r", vmin=-bound, vmax=bound
        )
        ax.tick_params(labelleft=left, labelbottom=bottom)
        ax.set(
            title=plot_label(label),
            xlabel="expert of task" if bottom else None,
            ylabel="samples of task" if left else None,
        )
    figure.colorbar(image, ax=axes, label="mean gate value", shrink=0.8, aspect=30)
    return figure
