"""Pictures of a results file: the stages of every contender as stacked bars, and cost over size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mingle.bench.endtoend.clock import STAGES
from mingle.bench.endtoend.contenders import BF16, EAGER, OURS, PUBLISHED
from mingle.bench.plot import STYLE, empty_figure, where
from mingle.bench.table import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STAGE_COLORS = dict(
    zip(STAGES, ("#BBBBBB", "#AA3377", "#EE6677", "#4477AA", "#228833", "#CCBB44"), strict=True)
)
_COLORS = {OURS: "#CC3311", BF16: "#EE9944", EAGER: "#44AA99", PUBLISHED: "#4477AA"}
_MARKERS = {OURS: "o", PUBLISHED: "s"}


def write_plots(results: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """``NAME.png`` in `folder`, which is made where it is missing; none where nothing was timed."""
    from matplotlib import style

    folder.mkdir(parents=True, exist_ok=True)
    with style.context(STYLE, after_reset=True):
        figure = _growth(results) if "sweeps" in results else _stages(results)
        if figure is None:
            return []
        path = folder / f"{name}.png"
        figure.savefig(path)
    return [path]


def _stages(results: Mapping[str, Any]) -> Figure | None:
    """Seconds of every contender's stages, one bar each."""
    timed = {name: result for name, result in results["contenders"].items() if "stages" in result}
    if not timed:
        return None
    case = results["case"]
    figure = empty_figure(9.0, 1.9 + 0.42 * len(timed))
    figure.suptitle(
        f"Merging {case['tasks']} tasks into {case['title']}, gates of a {case['options']['reduce']}"
    )
    ax = figure.subplots()
    note = "" if results["mode"] == "whole" else "; extrapolated from a few steps"
    ax.set_title(f"{where(results)}{note}", color="#666666")
    for row, (name, result) in enumerate(timed.items()):
        left = 0.0
        for stage in STAGES:
            ax.barh(
                row,
                result["stages"][stage],
                left=left,
                height=0.66,
                color=_STAGE_COLORS[stage],
                label=stage if row == 0 else None,
            )
            left += result["stages"][stage]
        ratio = results["ratios"].get(OURS, {}).get(name, {}).get("whole")
        text = duration(result["whole_seconds"]) + (f"   {ratio:.2f}×" if ratio and name != OURS else "")
        ax.annotate(text, (left, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5,
                    fontweight="bold" if name == OURS else "normal")  # fmt: skip
    ax.set_yticks(range(len(timed)), list(timed))
    for tick, name in zip(ax.get_yticklabels(), timed, strict=True):
        tick.set_fontweight("bold" if name == OURS else "normal")
    ax.tick_params(axis="y", length=0)
    longest = max(sum(result["stages"].values()) for result in timed.values())
    ax.set(xlim=(0, longest * 1.18), ylim=(len(timed) - 0.5, -0.5), xlabel="seconds")
    ax.grid(True, axis="x")
    figure.legend(loc="outside lower center", ncols=len(STAGES), fontsize=8, frameon=False)
    return figure


def _growth(results: Mapping[str, Any]) -> Figure:
    """Above the seconds of a step, below the memory of an adaptation; last what many tasks leave behind."""
    sweeps, kept = results["sweeps"], results["kept"]
    figure = empty_figure(3.5 * (len(sweeps) + 1), 6.2)
    sizes = results["sizes"]
    figure.suptitle(
        f"How the cost of an adaptation step grows: width {sizes['width']}, {sizes['blocks']} blocks, {sizes['tasks']} tasks where they do "
        f"not vary; gates of a {results['reduce']}\n{where(results)}",
        fontsize=10,
    )
    axes = figure.subplots(2, len(sweeps) + 1, squeeze=False)
    for column, sweep in enumerate(sweeps.values()):
        for ax, key, scale, unit in (
            (axes[0][column], "seconds", 1e3, "step (ms)"),
            (axes[1][column], "peak_bytes", 1e-6, "peak (MB)"),
        ):
            for name, curve in sweep["curves"].items():
                fitted = curve["exponents"][key]
                label = f"{name}: {fitted['all']:.2f}, upper half {fitted['upper']:.2f}"
                ax.plot(sweep["values"], [value * scale for value in curve[key]], _MARKERS[name] + "-", color=_COLORS[name], label=label,
                        markersize=4.5, linewidth=1.4)  # fmt: skip
            _logarithmic(ax, sweep["values"])
            ax.set(xlabel=sweep["label"], ylabel=unit)
            bottom, top = ax.get_ylim()
            ax.set_ylim(bottom, top * (top / bottom) ** 0.3)  # room for the legend
            ax.legend(fontsize=7, title="exponent", title_fontsize=7, frameon=False, loc="upper left")
    over, left = axes[0][-1], axes[1][-1]
    megabytes = {key: [value / 1e6 for value in kept[key]] for key in ("held_bytes", "accounted_bytes")}
    over.plot(
        kept["tasks"],
        megabytes["held_bytes"],
        color=_COLORS[OURS],
        linewidth=2.4,
        label="all tensors beyond the base",
    )
    over.plot(
        kept["tasks"],
        megabytes["accounted_bytes"],
        "--",
        color="black",
        linewidth=1,
        label="experts, gates, bases",
    )
    over.set(xlabel="tasks merged", ylabel="kept (MB)", ylim=(0, None), xlim=(0, None))
    over.legend(fontsize=7, frameon=False, loc="upper left")
    rest = [
        (held - known) / 1e3 for held, known in zip(kept["held_bytes"], kept["accounted_bytes"], strict=True)
    ]
    left.plot(kept["tasks"], rest, color=_COLORS[OURS], linewidth=1.4)
    left.set(xlabel="tasks merged", ylabel="kept beyond these (kB)")
    left.set(xlim=(0, None), ylim=(min(0, *rest), max(1, *rest) * 1.3))
    for ax in (over, left):
        ax.grid(True)
    return figure


def _logarithmic(ax: Axes, values: list[int]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    ax.set(xscale="log", yscale="log")
    ax.set_xticks(values, list(map(str, values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, which="major")
