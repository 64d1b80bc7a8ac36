"""The common parts of all plots: style, colours, small multiples, heat maps and labels beside curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mingle.runs.report.numbers import is_known, number
from mingle.text import TITLE_LENGTH, plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the most tasks with which a heat map shows numbers
MOST_NUMBERED = 10
# fmt: off
#: one colour per method in all plots: MINGLE's family warm, the others cool or muted, the references grey
COLORS = {
    "pre-trained": "#999999", "individual": "#555555",
    "average": "#88CCEE", "task-arithmetic": "#4477AA", "ties": "#CC99BB", "magmax": "#AA4499",
    "consensus-ta": "#999933", "opcm": "#117733", "tsv-m": "#7AB648", "iso-c": "#B8CC66", "wudi": "#6A7FDB",
    "adamerging": "#44AA99", "wemoe": "#332288", "nufilt": "#111111", "made-it": "#DDAA33",
    "mass": "#66BBCC", "routed": "#0077BB",
    "mingle": "#CC3311", "mingle-light": "#EE9944", "mingle-seq": "#882255",
}
OTHER_COLOR = "#AA8855"
#: from first to last: tasks by arrival, blocks by depth
_FIRST_TO_LAST = ("#F2B04C", "#C8427E", "#26266B")
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "figure.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#E4E4E4", "lines.solid_capstyle": "butt",
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 150, "savefig.bbox": "tight",
}
# fmt: on


def figure_of(width: float, height: float, title: str) -> Figure:
    """An empty figure, its size in inches, that pyplot does not know of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="compressed")
    FigureCanvasAgg(figure)
    figure.suptitle(plot_label(title, TITLE_LENGTH))
    return figure


def small_multiples(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Axes], int]:
    """A figure of `count` panels, each of that size in inches; its panels row by row, and the row length."""
    rows = math.ceil(count / math.ceil(math.sqrt(1.5 * count)))
    columns = math.ceil(count / rows)
    figure = figure_of(columns * width + 2, rows * height + 1.2, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count], columns


def heat_map(
    ax: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    digits: int | None,
    **style: Any,
) -> Any:
    """Draw values [rows, columns] as colours, NaN blank, and return the image.

    Up to `MOST_NUMBERED` columns the values are also written, with `digits` decimals unless that is None.
    """
    image = ax.imshow(values, **style)
    rotation, size = (45, 8) if len(columns) <= MOST_NUMBERED else (90, 6.5)
    ax.set_xticks(
        range(len(columns)),
        [plot_label(column) for column in columns],
        rotation=rotation,
        rotation_mode="anchor",
        ha="right",
        va="center",
        fontsize=size,
    )
    ax.set_yticks(range(len(rows)), map(plot_label, rows), fontsize=8 if len(rows) <= MOST_NUMBERED else 6.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bright = image.to_rgba(values)[..., :3] @ (0.3, 0.6, 0.1) > 0.42
    for (i, j), value in np.ndenumerate(values):
        if digits is not None and len(columns) <= MOST_NUMBERED and is_known(value):
            ax.text(
                j,
                i,
                number(value, digits),
                ha="center",
                va="center",
                fontsize=7,
                color="black" if bright[i, j] else "white",
            )
    return image


def first_to_last(figure: Figure, axes: Sequence[Axes], labels: Sequence[str], title: str) -> np.ndarray:
    """One colour for each of an ordered set, explained by a colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    count = len(labels)
    colors = ScalarMappable(
        Normalize(-0.5, count - 0.5), LinearSegmentedColormap.from_list("", _FIRST_TO_LAST, count)
    )
    bar = figure.colorbar(colors, ax=axes, label=title, aspect=30)
    bar.set_ticks(range(count), labels=[plot_label(label) for label in labels])
    bar.ax.invert_yaxis()
    return colors.to_rgba(np.arange(count))


def label_ends(figure: Figure, ax: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each name and y right of the axes, in its colour, joined to the point (x, y)."""
    figure.draw_without_rendering()  # settles the layout, and so the height of the axes
    low, high = ax.get_ylim()
    gap = (high - low) * 11 / 72 * figure.dpi / ax.get_window_extent().height  # 11 points
    heights = spread([y for _, _, y, _ in ends], gap, low, high)
    for (name, x, y, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            f"{plot_label(name)}  {number(y)}",
            xy=(x, y),
            xytext=(1.04, height),
            textcoords=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=color,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """The heights, moved as little as possible to be at least `gap` apart within [low, high].

    Their order stays.  After subtracting gap · rank this is isotonic regression:
    fit_i = max_{j ≤ i} min_{k ≥ i} mean(z_j … z_k).
    """
    order, steps = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    z = np.asarray(heights)[order] - steps
    fit = [
        max(min(z[j : k + 1].mean() for k in range(i, len(z))) for j in range(i + 1)) for i in range(len(z))
    ]
    placed = np.empty(len(z))
    placed[order] = np.clip(fit, low, high - steps[-1]) + steps
    return placed
