"""Pictures of what costs how much over something that grows, and the exponents of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mingle.bench.measure import OURS, log
from mingle.bench.plot import color_of, logarithmic
from mingle.bench.record import Results
from mingle.bench.table import where
from mingle.runs.report.canvas import STYLE, figure_of

_COLUMNS = 4
#: by benchmark what is drawn over what is swept, above and below: key, scale, unit
_SWEPT = {
    "growth": (("median", 1e3, "step (ms)"), ("peak_bytes", 1e-6, "peak (MB)")),
    "files": (("cpu_seconds", 1, "CPU time (s)"), ("peak_bytes", 1e-9, "peak (GB)")),
}


def exponents(values: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """p of cost ∝ valueᵖ, fitted to all points and to the upper half of them, at least two."""
    points = {"all": len(values), "upper": max(2, (len(values) + 1) // 2)}
    logs = np.log(values), np.log(costs)
    return {name: float(np.polyfit(logs[0][-n:], logs[1][-n:], 1)[0]) for name, n in points.items()}


def draw(results: Results, path: Path) -> None:
    """Time above memory, four cases side by side; last what many tasks leave behind, if that is known."""
    with style.context(STYLE, after_reset=True):
        _figure(results).savefig(path)
    log.info("wrote %s", path)


def _figure(results: Results) -> Figure:
    cases = results["cases"]
    panels = len(cases) + ("kept" in results)
    columns, bands = min(panels, _COLUMNS), -(-panels // _COLUMNS)
    figure = figure_of(3.5 * columns, 6.2 * bands, f"{results['title']}    ({where(results)})")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    pairs = [axes[2 * band : 2 * band + 2, column] for band in range(bands) for column in range(columns)]
    for ax in itertools.chain(*pairs[panels:]):
        ax.remove()
    for pair, case in zip(pairs, cases, strict=False):
        for ax, (key, scale, unit) in zip(pair, _SWEPT[results["benchmark"]], strict=True):
            for name, fitted in case["exponents"].items():
                own = [row for row in case["rows"] if row["name"] == name and row.get(key)]
                points = [(row["at"], row[key] * scale) for row in own]
                told = f": {fitted[key]['all']:.2f}, upper half {fitted[key]['upper']:.2f}" if fitted else ""
                ax.plot(
                    *zip(*points, strict=True), "o-", color=color_of(name), label=name + told, markersize=4.5
                )
            logarithmic(ax)
            ax.set_xticks(
                case["facts"]["values"], [f"{round(value, 2):g}" for value in case["facts"]["values"]]
            )
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set(xlabel=case["title"], ylabel=unit)
            low, high = ax.get_ylim()
            ax.set_ylim(
                low, high * (high / low) ** (0.13 * (1 + len(case["exponents"])))
            )  # the legend's room
            ax.legend(fontsize=7, title="exponent", title_fontsize=7, loc="upper left")
    if "kept" in results:
        _kept(*pairs[panels - 1], results["kept"])
    return figure


def _kept(over: Axes, left: Axes, kept: Mapping[str, Any]) -> None:
    tasks, held, known = (np.array(kept[key]) for key in ("tasks", "held_bytes", "accounted_bytes"))
    over.plot(tasks, held / 1e6, color=color_of(OURS), linewidth=2.4, label="all tensors beyond the base")
    over.plot(tasks, known / 1e6, "--", color="black", linewidth=1, label="experts, gates, bases")
    over.legend(fontsize=7)
    over.set(xlabel="tasks merged", ylabel="kept (MB)")
    left.plot(tasks, (held - known) / 1e3, color=color_of(OURS), linewidth=1.4)
    left.set(xlabel="tasks merged", ylabel="kept beyond these (kB)", ylim=(min(0, *(held - known)), None))
