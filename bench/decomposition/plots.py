"""Pictures of a results file: error over time for every shape, and the time of a whole task as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogLocator, NullFormatter

from mingle.bench.decomposition.peers import EXACT, FAST, OURS
from mingle.bench.plot import STYLE, empty_figure, where
from mingle.bench.table import duration
from mingle.linalg.svd import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: by the first word of a method, and of a pipeline; ours warm, others cool
_COLORS = {
    "mingle": "#CC3311",
    "torch.svd_lowrank": "#4477AA",
    "QR,": "#4477AA",
    "Gram": "#228833",
    "torch.linalg.svd": "#555555",
}
_OTHER, _SECOND = (
    "#777777",
    {"mingle, 96 vectors, by power iterations": "#EE9944", "torch.svd_lowrank, q = 64, by niter": "#88BBDD"},
)
_MARKERS = {"mingle": "o", "torch.svd_lowrank": "s", "Gram": "^", "torch.linalg.svd": "D"}
#: excess residuals under this are rounding errors, and drawn there
_LEAST = 1e-13


def write_plots(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """``curves-CASE.png`` and ``task-CASE.png`` in `folder`."""
    from matplotlib import style

    written = []
    with style.context(STYLE, after_reset=True):
        for name, figure in (("curves", _curves(results)), ("task", _bars(results))):
            if figure is not None:
                written.append(folder / f"{name}-{results['case']['name']}.png")
                figure.savefig(written[-1])
    return written


def _curves(results: Mapping[str, Any]) -> Figure | None:
    shapes = [
        measured
        for measured in results["decompose"]
        if any("median" in peer for peer in measured["peers"].values())
    ]
    if not shapes:
        return None
    figure = empty_figure(1.2 + 4.1 * len(shapes), 5.4)
    figure.suptitle(
        f"Rank {results['case']['rank']} of {results['case']['title']}: error over time    ({where(results)})"
    )
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    for ax, measured in zip(panels, shapes, strict=True):
        lines |= _panel(ax, measured)
    panels[0].set_ylabel("residual over the best of this rank, less 1 (1e-13 where below)")
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    return figure


def _panel(ax: Axes, measured: Mapping[str, Any]) -> dict[str, Any]:
    """One line per method and fixed parameter; its handles by label."""
    shape = measured["shape"]
    curves: dict[str, list[tuple[float, float, str]]] = {}
    for peer in measured["peers"].values():
        if "median" in peer:
            point = (peer["median"] * 1e3, max(peer["errors"]["excess"], _LEAST), peer["label"])
            curves.setdefault(peer["curve"], []).append(point)
    for limit, name in ((EXACT, "accurate"), (FAST, "fast")):
        ax.axhline(limit, color="#117733", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        _label(
            ax,
            f"limit of {name}",
            (1, limit),
            (-3, 3),
            "#117733",
            xycoords=("axes fraction", "data"),
            ha="right",
        )
    handles = {}
    for curve, points in curves.items():
        points.sort()
        family = next((word for word in _MARKERS if curve.startswith(word)), "")
        color, own = _SECOND.get(curve, _COLORS.get(family, _OTHER)), family == OURS
        line = "-" if len(points) > 2 else ""
        style = dict(
            color=color,
            marker=_MARKERS.get(family, "v"),
            linestyle=line,
            linewidth=1.6 if own else 1.2,
            markersize=5,
        )
        (handles[curve],) = ax.plot(
            *zip(*(point[:2] for point in points), strict=True), zorder=4 if own else 3, **style
        )
        offset, align = (
            ((-5, -3), "right")
            if curve in _SECOND
            else ((0, -12), "center")
            if not line
            else ((5, 3), "left")
        )
        for x, y, label in _apart(points):
            if mode := label in MODES:
                ax.plot(x, y, marker="*", markersize=13, color=color, zorder=5)
            _label(
                ax, label, (x, y), offset, color, ha=align, fontweight="bold" if mode else "normal", zorder=6
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="milliseconds per layer",
        title=f"{shape['m']}×{shape['n']}, {shape['count']} layers",
    )
    ax.margins(x=0.09, y=0.09)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major")
    return handles


def _label(
    ax: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], color: str, **options: Any
) -> None:
    ax.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=7.5, color=color, **options)


def _apart(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Sorted points, those within a tenth of each other's time and error as one with both labels."""
    found: list[tuple[float, float, str]] = []
    for x, y, label in points:
        if found and x < 1.1 * found[-1][0] and 0.9 < y / found[-1][1] < 1.1:
            found[-1] = (*found[-1][:2], f"{found[-1][2]}, {label}")
        else:
            found.append((x, y, label))
    return found


def _bars(results: Mapping[str, Any]) -> Figure | None:
    """Seconds of all layers, the eighth task's from Δ to experts."""
    total = {name: one for name, one in results["totals"]["project"].items() if "median_seconds" in one}
    if not total:
        return None
    names = sorted(total, key=lambda name: total[name]["median_seconds"])
    figure = empty_figure(8.6, 1.5 + 0.33 * len(names))
    case = results["case"]
    figure.suptitle(f"The experts of {case['title']}, {case['layers']} layers, after {case['earlier']} tasks")
    ax = figure.subplots()
    ax.set_title(where(results), color="#666666")
    for row, name in enumerate(names):
        one = total[name]
        ax.barh(row, one["median_seconds"], height=0.68, color=_COLORS.get(name.split()[0], _OTHER))
        ax.plot(
            [one["p20_seconds"], one["p80_seconds"]],
            [row, row],
            "|-",
            color="black",
            linewidth=1,
            markersize=6,
        )
        ratio = f"   {one['ratio']:.2f}×" if name != OURS and "ratio" in one else ""
        ax.annotate(f"{duration(one['median_seconds'])}{ratio}", (one["p80_seconds"], row), xytext=(5, 0), textcoords="offset points",
                    va="center", fontsize=8, fontweight="bold" if name == OURS else "normal")  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    longest = max(one["p80_seconds"] for one in total.values())
    ax.set(
        xlim=(0, longest * 1.2),
        ylim=(len(names) - 0.4, -0.6),
        xlabel="seconds; whiskers: 20th to 80th percentile",
    )
    ax.grid(True, axis="x")
    return figure
