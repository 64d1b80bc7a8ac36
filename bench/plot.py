"""Pictures of a results file: per case the peers as bars, and all cases under the measured roofline."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mingle.bench.peers import OURS
from mingle.bench.registry import Case
from mingle.bench.table import duration, shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# fmt: off
#: ours warm, what others compute cool, what does less work hollow
_OURS, _OWN_BACKENDS, _OTHERS, _BOUND, _WRONG = "#CC3311", "#EE9944", "#4477AA", "#999999", "#882255"
_DTYPES = {"float32": ("fp32", "#4477AA", "s"), "float16": ("fp16", "#44AA99", "^"), "bfloat16": ("bf16", "#CC3311", "o")}
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8.5, "figure.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#E4E4E4", "hatch.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08, "savefig.dpi": 150, "savefig.bbox": "tight",
}
# fmt: on
#: behind text, so that lines do not cross it
_PATCH = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """``bars-CASE.png`` of every case that has times, and ``roofline.png``, in `folder`, which is made where
    it is missing.
    """
    from matplotlib import style

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style.context(STYLE, after_reset=True):
        figures = {f"bars-{case['case']['name']}": _bars(results, case) for case in results["cases"]}
        for name, figure in (figures | {"roofline": _roofline(results)}).items():
            if figure is not None:
                written.append(folder / f"{name}.png")
                figure.savefig(written[-1])
    return written


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, unknown to pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def where(results: Mapping[str, Any]) -> str:
    device, torch = results["device"], results["versions"]["torch"]
    threads = f", threads: {device['threads']}" if device["type"] == "cpu" else ""
    return f"{device['name']}{threads}, torch {torch}"


def _bars(results: Mapping[str, Any], measured: Mapping[str, Any]) -> Figure | None:
    """Median times from fastest to slowest, whiskers from the 20th to the 80th percentile, the floor as a
    line.
    """
    peers = sorted(
        ((name, peer) for name, peer in measured["peers"].items() if "median" in peer),
        key=lambda item: item[1]["median"],
    )
    wrong = [name for name, peer in measured["peers"].items() if peer["status"] == "wrong"]
    if not peers:
        return None
    case, floor = Case(**measured["case"]), measured["floor"]
    unit, scale = ("ms", 1e3) if peers[-1][1]["median"] >= 1e-3 else ("µs", 1e6)
    figure = empty_figure(8.6, 1.75 + 0.27 * (len(peers) + len(wrong)))
    ax = figure.subplots()
    direction = "forward and backward" if case.backward else "forward"
    gates = "routed one-hot gates" if case.routed else f"{case.reduce} gates"
    figure.suptitle(f"{shape(case)}, {gates}, {case.dtype}, {direction}")
    ax.set_title(where(results), color="#666666")

    longest = max(peer["p80"] for _, peer in peers) * scale
    for row, (name, peer) in enumerate(peers):
        low, median, high = (peer[key] * scale for key in ("p20", "median", "p80"))
        ax.barh(row, median, height=0.68, **_bar_style(name, peer["status"]))
        ax.plot([low, high], [row, row], color="black", linewidth=1)
        ax.plot([low, high], [row, row], "|", color="black", markersize=6, markeredgewidth=1)
        ratio = f"   {peer['round_ratio']:.2f}×" if "round_ratio" in peer and name != OURS else ""
        ax.annotate(
            f"{duration(peer['median'])}{ratio}",
            (high, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if name == OURS else "normal",
            bbox=_PATCH,
            zorder=4,
        )
    names = [*(name for name, _ in peers), *wrong]
    for row in range(len(peers), len(names)):
        ax.annotate(
            "WRONG",
            (0, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_WRONG,
            fontweight="bold",
            bbox=_PATCH,
        )
    ax.axvline(floor["seconds"] * scale, color="#117733", linewidth=1.2, linestyle=(0, (4, 2)), zorder=3)
    label = f"floor {duration(floor['seconds'])}: {floor['bound']}"
    ax.annotate(
        label,
        (floor["seconds"] * scale, -0.82),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="#117733",
    )
    ax.set_yticks(range(len(names)), names)
    for tick, name in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name == OURS else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set(
        xlim=(0, longest * 1.2),
        ylim=(len(names) - 0.4, -1.25),
        xlabel=f"time ({unit}); whiskers: 20th to 80th percentile",
    )
    ax.grid(True, axis="x")
    _bar_legend(figure, {name: peer["status"] for name, peer in peers})
    return figure


def _bar_style(name: str, status: str) -> dict[str, Any]:
    if status == "bound":
        return {"facecolor": "white", "edgecolor": _BOUND, "hatch": "////", "linewidth": 0.8}
    return {"color": _OURS if name == OURS else _OWN_BACKENDS if name.startswith(OURS) else _OTHERS}


def _bar_legend(figure: Figure, statuses: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    kinds = {
        "this library": (OURS, "ok"),
        "its other forms": (f"{OURS} x", "ok"),
        "others": ("x", "ok"),
        "less work: a bound": ("x", "bound"),
    }
    shown = {tuple(sorted(_bar_style(name, status).items())) for name, status in statuses.items()}
    styles = {label: _bar_style(*kind) for label, kind in kinds.items()}
    handles = [
        Patch(label=label, **style)
        for label, style in styles.items()
        if tuple(sorted(style.items())) in shown
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=8, frameon=False)


def _roofline(results: Mapping[str, Any]) -> Figure | None:
    """Operations per second over operations per byte, the counts being those of the cheaper algorithm, under
    the measured ceilings.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    points = [
        (
            Case(**case["case"]),
            case["count"]["flop"] / case["count"]["bytes"],
            case["count"]["flop"] / case["peers"][OURS]["median"] / 1e12,
        )
        for case in results["cases"]
        if "median" in case["peers"][OURS]
    ]
    if not points:
        return None
    copy = results["ceilings"]["bytes_per_second"] / 1e12
    roofs = {dtype: rate / 1e12 for dtype, rate in results["ceilings"]["flop_per_second"].items()}
    reached = [(x, y) for _, x, y in points]
    figure = empty_figure(10.2, max(5.2, 0.21 * len(points) + 1.6))
    figure.suptitle("What this library reaches of what the machine allows")
    ax, legend = figure.subplots(1, 2, width_ratios=(2.1, 1))
    ax.set_title(where(results), color="#666666")

    left = min(x for x, _ in [*reached, *((roof / copy, 0) for roof in roofs.values())]) / 4
    right = max(x for x, _ in [*reached, *((roof / copy, 0) for roof in roofs.values())]) * 3
    bottom, top = (
        min(min(y for _, y in reached), *(roof / 4 for roof in roofs.values())) / 2,
        max(roofs.values()) * 1.7,
    )
    intensity = np.geomspace(left, right, 400)
    for dtype, roof in roofs.items():
        name, color, _ = _DTYPES[dtype]
        ax.plot(intensity, np.minimum(intensity * copy, roof), color=color, linewidth=1.6)
        ax.fill_between(
            intensity, np.minimum(intensity * copy, roof), bottom, color=color, alpha=0.04, linewidth=0
        )
        text = f"{name}, large product: {roof:.3g} TFLOP/s"
        ax.annotate(
            text,
            (right, roof),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=color,
        )
    foot = max(left, bottom / copy) * 1.35
    text = f"large copy: {copy * 1e3:.3g} GB/s"
    ax.annotate(
        text, (foot, foot * copy), xytext=(9, -3), textcoords="offset points", fontsize=8, color="#444444"
    )

    lines = []
    for number, (case, x, y) in enumerate(points, start=1):
        _, color, marker = _DTYPES[case.dtype]
        face = "white" if case.backward else color
        ax.plot(x, y, marker, markersize=7, zorder=3, markerfacecolor=face, markeredgecolor=color, alpha=0.9)
        lines.append(
            (
                f"{number:>2}  {textwrap.shorten(case.name, 34)}",
                f"{y / min(x * copy, roofs[case.dtype]):.0%}",
                color,
            )
        )
    for numbers, (x, y) in _together(reached, np.log(right / left), np.log(top / bottom)):
        text = ", ".join(map(str, numbers))
        ax.annotate(
            text,
            (x, y),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7.5,
            zorder=4,
        )
    _list(legend, [*lines, ("filled: forward, hollow: with backward", "", "#666666")])
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    ax.set(xlabel="operations per byte of memory traffic (FLOP/B)", ylabel="operations per second (TFLOP/s)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major")
    return figure


def _together(
    points: Sequence[tuple[float, float]], width: float, height: float
) -> list[tuple[list[int], tuple[float, float]]]:
    """Numbers from 1 of points too close for a label each, and where their common label goes: below the
    middle of them all.
    """
    groups: list[list[int]] = []
    logs = np.log(np.array(points)) / (width, height)
    for number in range(len(points)):
        near = [group for group in groups if (np.abs(logs[group] - logs[number]) < (0.05, 0.04)).all(1).any()]
        groups = [group for group in groups if group not in near] + [sorted(sum(near, [number]))]
    places = [np.exp([logs[group, 0].mean() * width, logs[group, 1].min() * height]) for group in groups]
    return [
        ([i + 1 for i in group], (float(x), float(y))) for group, (x, y) in zip(groups, places, strict=True)
    ]


def _list(ax: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    """Number, case and share of the roof, one line each."""
    ax.axis("off")
    step = min(0.05, 0.94 / len(lines))
    ax.text(0, 1, "case", fontsize=8, color="#666666", va="top", transform=ax.transAxes)
    ax.text(1, 1, "of roof", fontsize=8, color="#666666", va="top", ha="right", transform=ax.transAxes)
    for row, (name, share, color) in enumerate(lines, start=1):
        ax.text(0, 1 - row * step, name, fontsize=8, color=color, va="top", transform=ax.transAxes)
        ax.text(
            1, 1 - row * step, share, fontsize=8, color=color, va="top", ha="right", transform=ax.transAxes
        )
