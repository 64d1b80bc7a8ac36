"""The plots of a run, as PNG files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mingle.runs.report.canvas import (
    COLORS,
    MOST_NUMBERED,
    OTHER_COLOR,
    STYLE,
    figure_of,
    first_to_last,
    heat_map,
    label_ends,
    small_multiples,
)
from mingle.runs.report.numbers import REFERENCES, caption, mean_of, number, unknown_of
from mingle.text import plot_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(results: Mapping[str, Any], traces: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the run's plots as PNG files to `folder`, which is created if missing, and return their paths.

    A plot without data is left out.
    """
    from matplotlib import style

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.context(STYLE, after_reset=True):
        for name, figure in {
            "accuracy_matrix": _plot_matrices(results),
            "accuracy_over_tasks": _plot_accuracy(results),
            "task_known_or_unknown": _plot_unknown(results),
            "gate_activation": _plot_gates(traces),
            "interference": _plot_interference(traces),
            "loss": _plot_loss(traces),
        }.items():
            if figure is not None:
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1])
    return written


def _plot_matrices(results: Mapping[str, Any]) -> Figure | None:
    """For each method, the accuracy on every task (column) after every merge (row) of the first order."""
    methods = {
        name: result
        for name, result in results["methods"].items()
        if name != "pre-trained" and result["matrix"]
    }
    if not methods:
        return None
    count = max(len(result["order"][0]) for result in methods.values())
    side = max(2.2, (0.36 if count <= MOST_NUMBERED else 0.125) * count)
    title = f"Accuracy on every task after every merge, first order ({caption(results)})"
    figure, axes, columns = small_multiples(len(methods), side + 0.1, side + 0.5, title)
    for i, (ax, (name, result)) in enumerate(zip(axes, methods.items(), strict=True)):
        tasks, left, bottom = result["order"][0], i % columns == 0, i + columns >= len(methods)
        image = heat_map(
            ax, np.array(result["matrix"][0], float), tasks, tasks, 0, cmap="viridis", vmin=0, vmax=100
        )
        ax.tick_params(labelleft=left, labelbottom=bottom)
        ax.set(xlabel="accuracy on task" if bottom else None, ylabel="after merging task" if left else None)
        ax.set_title(f"{plot_label(name)}: ACC {number(result['acc'][0])}, BWT {number(result['bwt'][0])}")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.8, aspect=30)
    return figure


def _plot_accuracy(results: Mapping[str, Any]) -> Figure | None:
    """Mean accuracy over the tasks merged so far, by their number, ± one standard deviation over orders."""
    curves = {  # [orders, T]
        name: np.array(
            [[mean_of(row[: i + 1]) for i, row in enumerate(matrix)] for matrix in result["matrix"]]
        )
        for name, result in results["methods"].items()
    }
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve.sum(0)).any()}
    if not curves:
        return None
    figure = figure_of(
        7.2, max(4.2, 0.2 * len(curves) + 2), f"Accuracy over the tasks seen so far ({caption(results)})"
    )
    ax = figure.subplots()
    ends = []
    for name, curve in curves.items():
        mean, x, color = curve.mean(0), np.arange(1, curve.shape[1] + 1), COLORS.get(name, OTHER_COLOR)
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
    label_ends(figure, ax, ends)
    return figure


def _plot_unknown(results: Mapping[str, Any]) -> Figure | None:
    """For each method, ACC where the task is known and where it has to be found, ± one standard deviation."""
    methods = {
        name: result
        for name, result in results["methods"].items()
        if np.isfinite([mean_of(result["acc"]), mean_of(unknown_of(result))]).all()
    }
    if not methods:
        return None
    height = 0.42 * len(methods) + 1.6
    figure = figure_of(7.2, height, f"Accuracy where nobody says which task it is ({caption(results)})")
    ax = figure.subplots()
    for row, (name, result) in enumerate(methods.items()):
        color = COLORS.get(name, OTHER_COLOR)
        ends = [mean_of(result["acc"]), mean_of(unknown_of(result))]
        ax.plot(ends, [row, row], color=color, linewidth=1.2, zorder=1)
        for values, end, face in zip(
            (result["acc"], unknown_of(result)), ends, (color, "white"), strict=True
        ):
            std = np.std(np.array(values, float), ddof=1) if len(values) > 1 else 0
            ax.errorbar(end, row, xerr=std, fmt="o", color=color, markerfacecolor=face, markersize=7)
    ax.set_yticks(range(len(methods)), map(plot_label, methods))
    ax.invert_yaxis()
    ax.set(xlabel="ACC (%): full where the task is known, empty where it has to be found too", xlim=(0, 100))
    ax.grid(True, axis="x")
    return figure


def _preferred(traces: Mapping[str, Any], key: str) -> str | None:
    """Of the methods that recorded `key`: ``mingle``, or else the first."""
    recorded = [name for name, trace in traces.items() if any(trace[key])]
    return "mingle" if "mingle" in recorded else next(iter(recorded), None)


def _plot_gates(traces: Mapping[str, Any]) -> Figure | None:
    """The gates after the last merge.

    Left: every expert's gate on every task's samples.  Right: how far a task's own expert stands out in each
    layer.
    """
    name = _preferred(traces, "gates")
    if name is None:
        return None
    trace = traces[name]
    gates = np.array(trace["gates"], float)  # [tasks, layers, experts]
    count = gates.shape[2]
    # a skipped task has no loss and no expert
    owners = [task for task, loss in enumerate(trace["loss"]) if loss]
    owners = owners if len(owners) == count else list(range(count))
    own = gates[owners, :, range(count)].T  # [layers, experts]
    selectivity = own - (gates[owners].sum(2).T - own) / max(count - 1, 1)

    tasks, experts = trace["order"], [trace["order"][owner] for owner in owners]
    # encoder.layers.0.self_attn.q_proj → 0 q_proj
    layers = [re.sub(r"^\D*(\d+).*\.", r"\1 ", layer) for layer in trace["layers"]]
    height = max(2.6, 0.11 * len(layers), 0.14 * len(tasks)) + 1.5
    figure = figure_of(11, height, f"{name}: gates after the last merge")
    left, right = figure.subplots(1, 2)
    bound = np.abs(gates.mean(1)).max()
    image = heat_map(
        left, gates.mean(1), tasks, experts, 2, cmap="RdBu_r", aspect="auto", vmin=-bound, vmax=bound
    )
    left.set(
        title="Which expert answers to which task (mean over layers)",
        xlabel="expert of task",
        ylabel="samples of task",
    )
    figure.colorbar(image, ax=left, label="mean gate value", aspect=40)
    bound = np.quantile(np.abs(selectivity), 0.98)  # a few extreme layers would wash out the rest
    image = heat_map(
        right, selectivity, layers, experts, None, cmap="RdBu_r", aspect="auto", vmin=-bound, vmax=bound
    )
    right.set(
        title="Selectivity of every layer: own expert − mean of the others",
        xlabel="samples of task",
        ylabel="layer, by depth",
    )
    figure.colorbar(
        image, ax=right, label="difference of mean gate values", aspect=40, extend="both", extendfrac=0.02
    )
    return figure


def _plot_interference(traces: Mapping[str, Any]) -> Figure | None:
    """S and λ of every layer over the adaptation steps of all tasks that had a basis, one after another."""
    name = _preferred(traces, "interference")
    if name is None:
        return None
    trace = traces[name]
    tasks = [task for task, layers in enumerate(trace["interference"]) if layers]
    starts = np.cumsum([0, *map(len, trace["loss"])]) + 0.5
    # encoder.layers.0.mlp.fc1 → encoder.layers.0
    blocks = {layer: re.sub(r"^(\D*\d+).*", r"\1", layer) for layer in trace["layers"]}
    depths = {block: depth for depth, block in enumerate(dict.fromkeys(blocks.values()))}

    figure = figure_of(9.5, 5.4, f"{name}: interference with earlier tasks (thin: layers, thick: their mean)")
    axes = figure.subplots(2, 1, sharex=True)
    colors = first_to_last(figure, axes, [str(depth) for depth in depths.values()], "depth (block)")
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
    top, crowded = axes[0].secondary_xaxis("top"), len(tasks) > MOST_NUMBERED
    centres = [(starts[task] + starts[task + 1]) / 2 for task in tasks]
    top.set_xticks(
        centres,
        [plot_label(trace["order"][task]) for task in tasks],
        rotation=45 * crowded,
        ha="left" if crowded else "center",
    )
    top.tick_params(length=0)
    return figure


def _plot_loss(traces: Mapping[str, Any]) -> Figure | None:
    """For each adapting method, the loss over steps, one line per task."""
    methods = {name: trace for name, trace in traces.items() if any(trace["loss"])}
    if not methods:
        return None
    figure, axes, _ = small_multiples(len(methods), 3.2, 2.8, "Loss during test-time adaptation")
    colors = first_to_last(figure, axes, next(iter(methods.values()))["order"], "task, in order of arrival")
    for ax, (name, trace) in zip(axes, methods.items(), strict=True):
        for color, loss in zip(colors, trace["loss"], strict=True):
            ax.plot(range(1, len(loss) + 1), loss, color=color, linewidth=1.2)
        ax.set(title=plot_label(name), xlabel="adaptation step", ylabel="loss")
        ax.grid(True)
    return figure
