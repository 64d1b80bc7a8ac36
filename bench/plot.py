"""Pictures of results: rows as bars, cases under the roofline, and error over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mingle.bench.machine import STAGES
from mingle.bench.measure import OURS, Row, log
from mingle.bench.record import CaseResult, Results, timed_rows
from mingle.bench.table import duration, where
from mingle.runs.report.canvas import STYLE, figure_of

#: by the beginning of a row's name, the first that fits: ours warm, what others compute cool
_COLORS = {"mingle accurate": "#CC3311", "mingle 128": "#CC3311", "mingle ": "#EE9944", "mingle": "#CC3311"}
_COLORS |= {
    "torch.svd_lowrank 64": "#88BBDD",
    "Gram": "#228833",
    "torch.linalg.svd": "#555555",
    "mergekit bf16": "#88BBDD",
    "": "#4477AA",
}
_BOUND, _WRONG, _FLOOR, _GREY, _DASHED = "#999999", "#882255", "#117733", "#666666", (0, (4, 2))
_STAGES = dict(zip(STAGES, ["#BBBBBB", "#AA3377", "#EE6677", "#4477AA", "#228833", "#CCBB44"], strict=True))
_DTYPES = {"float32": ("fp32", "#4477AA", "s"), "float16": ("fp16", "#44AA99", "^")}
_DTYPES |= {"bfloat16": ("bf16", "#CC3311", "o")}
#: excess residuals under this are rounding errors, and drawn there
_LEAST = 1e-13


def write_plots(results: Results, folder: Path, name: str) -> list[Path]:
    """Every picture of the results in `folder`, which is made if missing; none where nothing was timed.

    ``bars-CASE`` and ``roofline`` of kernels, ``curves-NAME`` and ``task-NAME`` of experts, else ``NAME``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.context(STYLE, after_reset=True):
        for stem, figure in _figures(results, name):
            written.append(folder / f"{stem}.png")
            figure.savefig(written[-1])
            log.info("wrote %s", written[-1])
    return written


def _figures(results: Results, name: str) -> Iterator[tuple[str, Figure]]:
    kind, cases = results["benchmark"], [case for case in results["cases"] if timed_rows(case)]
    if kind == "kernels" and cases:
        yield from ((f"bars-{case['name']}", _bars(results, case)) for case in cases)
        yield "roofline", _roofline(results, cases)
    elif kind == "experts" and cases:
        yield f"curves-{name}", _curves(results, [case for case in cases if "curve" in case["rows"][0]])
        yield f"task-{name}", _bars(results, cases[-1])
    elif cases and "exponents" not in cases[0]:  # what grows is drawn by its studies
        yield name, _bars(results, cases[0])


def color_of(name: str) -> str:
    return next(color for start, color in _COLORS.items() if name.startswith(start))


def _text(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    ax.annotate(text, at, offset, textcoords="offset points", **{"fontsize": 8, "va": "center", **options})


def _bars(results: Results, case: CaseResult) -> Figure:
    """Median times from fastest to slowest, whiskers from p20 to p80; stages stacked, the floor as a line."""
    timed, floor = timed_rows(case), case.get("floor")
    names = [row["name"] for row in timed + [row for row in case["rows"] if row["status"] == "wrong"]]
    figure = figure_of(8.8, 1.9 + 0.3 * len(names), case["title"])
    ax = figure.subplots()
    for y, row in enumerate(timed):
        _bar(ax, y, row)
        ratio = f"   {row['round_ratio']:.2f}×" if "round_ratio" in row and row["name"] != OURS else ""
        weight = "bold" if row["name"] == OURS else "normal"
        _text(ax, duration(row["median"]) + ratio, (row["p80"], y), (6, 0), fontweight=weight)
    for y in range(len(timed), len(names)):
        _text(ax, "WRONG", (0, y), (5, 0), color=_WRONG, fontweight="bold")
    if floor:
        ax.axvline(floor["seconds"], color=_FLOOR, linewidth=1.2, linestyle=_DASHED, zorder=3)
        label = f"floor {duration(floor['seconds'])}: {floor['bound']}"
        _text(ax, label, (floor["seconds"], -0.82), (4, 0), color=_FLOOR)
    longest = max(row["p80"] for row in timed)
    unit, factor = ("ms", 1e3) if longest < 1 else ("s", 1)
    ax.set_yticks(range(len(names)), names)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value * factor:g}")
    ax.set(xlim=(0, longest * 1.2), ylim=(len(names) - 0.4, -1.25 if floor else -0.6))
    ax.set_title(where(results), color=_GREY)
    ax.set_xlabel(f"time ({unit}); whiskers: 20th to 80th percentile")
    ax.grid(True, axis="x")
    if ax.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=len(_STAGES))
    return figure


def _bar(ax: Axes, y: int, row: Row) -> None:
    left, bound = 0.0, dict(facecolor="white", edgecolor=_BOUND, hatch="////", linewidth=0.8)
    for stage, color in _STAGES.items() if "stages" in row else ():
        seconds = row["stages"][stage]["median"]
        ax.barh(y, seconds, left=left, height=0.66, color=color, label=stage if y == 0 else None)
        left += seconds
    if not left:
        filled: dict[str, Any] = bound if row["status"] == "bound" else dict(color=color_of(row["name"]))
        ax.barh(y, row["median"], height=0.68, **filled)
    ax.plot([row["p20"], row["p80"]], [y, y], "|-", color="black", linewidth=1, markersize=6)


def _roofline(results: Results, cases: Sequence[CaseResult]) -> Figure:
    """Operations per second over operations per byte, of the cheaper algorithm, under the ceilings."""
    copy = results["ceilings"]["bytes_per_second"] / 1e12
    roofs = {dtype: rate / 1e12 for dtype, rate in results["ceilings"]["flop_per_second"].items()}
    title, height = "What this library reaches of what the machine allows", 0.21 * len(cases) + 1.6
    figure = figure_of(10.2, max(5.2, height), title)
    ax, edges = figure.subplots(), [roof / copy for roof in roofs.values()]
    for number, case in enumerate(cases, start=1):
        for row in (row for row in timed_rows(case) if row["name"] == OURS):
            dtype, done = case["facts"]["dtype"], case["count"]["flop"]
            x, y = done / case["count"]["bytes"], done / row["median"] / 1e12
            _, color, marker = _DTYPES[dtype]
            label = f"{number} {case['name']}: {y / min(x * copy, roofs[dtype]):.0%}"
            face = "white" if case["facts"]["backward"] else color
            ax.plot(x, y, marker, markerfacecolor=face, markeredgecolor=color, alpha=0.9, label=label)
            _text(ax, str(number), (x, y), (6, -5), fontsize=7.5)
            edges.append(x)
    intensity = np.geomspace(min(edges) / 4, max(edges) * 3, 400)
    for dtype, roof in roofs.items():
        name, color, _ = _DTYPES[dtype]
        ax.plot(intensity, np.minimum(intensity * copy, roof), color=color, linewidth=1.6)
        label = f"{name}, large product: {roof:.3g} TFLOP/s"
        _text(ax, label, (intensity[-1], roof), (-4, 7), ha="right", color=color)
    _text(ax, f"large copy: {copy * 1e3:.3g} GB/s", (intensity[60], intensity[60] * copy), (9, -3))
    logarithmic(ax)
    ax.set(xlabel="operations per byte of memory traffic (FLOP/B)", ylabel="operations per second (TFLOP/s)")
    ax.set_title(where(results), color=_GREY)
    figure.legend(loc="outside right upper", title="case and share of its roof\n(hollow: with backward)")
    return figure


def logarithmic(ax: Axes) -> None:
    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major")


def _curves(results: Results, cases: Sequence[CaseResult]) -> Figure:
    """Error over time for every shape, one line per method and fixed parameter."""
    figure = figure_of(1.2 + 4.1 * len(cases), 5.4, f"Error over time    ({where(results)})")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for ax, case in zip(panels, cases, strict=True):
        curves: dict[str, list[Row]] = {}
        for row in timed_rows(case):
            curves.setdefault(row["curve"], []).append(row)
        for limit in (1e-5, 1e-4):  # of accurate and of fast
            ax.axhline(limit, color=_FLOOR, linewidth=0.9, linestyle=_DASHED, zorder=1)
        for curve, rows in curves.items():
            points = [(row["median"] * 1e3, max(row["errors"]["excess"], _LEAST)) for row in rows]
            color, line = color_of(rows[-1]["name"]), "o-" if len(rows) > 2 else "o"
            (handles[curve],) = ax.plot(*zip(*points, strict=True), line, color=color, markersize=5)
            for row, at in zip(rows, points, strict=True):
                _text(ax, row["label"], at, (5, 4), fontsize=7.5, color=color)
        logarithmic(ax)
        ax.set(xlabel="milliseconds per layer", title=case["title"])
    panels[0].set_ylabel("residual over the best of this rank, less 1 (1e-13 where below)")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure
