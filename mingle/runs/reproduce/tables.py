"""The tables of the paper: which settings of which methods are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mingle import tasks
from mingle.methods import METHODS
from mingle.nn.inject import find_targets
from mingle.options import OptionError, nearest
from mingle.runs.reproduce import paper
from mingle.suites import Suite

#: options of MINGLE in the paper's ablation, where each row adds one part
_ABLATION: dict[str, dict[str, Any]] = {
    "static coefficients": {"gates": "static"},
    "all gates trainable": {"gates": "all", "constraint": "none"},
    "old gates frozen": {"gates": "newest", "constraint": "none"},
    "hard projector": {"gates": "newest", "constraint": "hard"},
    "relaxed projector": {"gates": "newest", "constraint": "relaxed"},
}
#: the choices behind the routed experts: each row changes one
_ROUTER: dict[str, dict[str, Any]] = {
    "routed": {},
    "hard gates": {"gates": "hard"},
    "as sure as the Gaussians are": {"temperature": 1.0},
    "one covariance for all tasks": {"own_covariance": 0.0},
    "means alone": {"spread": False},
    "embeddings alone": {"depths": (0,)},
    "embeddings and two blocks together": {"depths": (0, 1, 2)},
    "older tasks preferred": {"seniority": 1.0},
    "never abstaining": {"abstain": None},
    "rank 64": {"rank": 64},
}
#: what this library adds to MINGLE, each alone: method and options
_ADDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "as published": ("mingle", {}),
    "lr: auto": ("mingle", {"lr": "auto"}),
    "ranks by 90 % of the energy": ("mingle", {"energy": 0.9}),
    "behind a router": ("mingle-routed", {}),
    "behind a router that decides alone": ("mingle-routed", {"trust": 1.0}),
}
_LAYER_SETS = ("full", "light", "attention", "mlp")
_RANKS = (32, 64, 128)


@dataclass(frozen=True)
class Row:
    """One row: a method with the options that make it differ from the other rows.

    Attributes:
        label: unique in its table.
        method: a name in `mingle.methods.METHODS`.
        options: settings of the method that this row fixes.
        samples_per_class: seed samples, where the row fixes their number.
        series: in a sweep, the curve that the row is a point of; in the ablation, the part of the method that
            it shows.
        value: the swept quantity.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    samples_per_class: int | None = None
    series: str | None = None
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it compares.
        rows: makes the rows for a suite and the methods asked for.
        methods: makes the methods where none are asked for.
        published: the suites for which the paper shows it.
        axis: the swept quantity, where the table is a sweep.
        suites: makes the suites that stand side by side where one is named.
    """

    title: str
    rows: Callable[[Suite, Sequence[str]], list[Row]]
    methods: Callable[[], tuple[str, ...]] = lambda: ("mingle",)
    published: tuple[str, ...] = ()
    axis: str | None = None
    suites: Callable[[str], tuple[str, ...]] = lambda name: (name,)


def get(name: str) -> Table:
    """The table of that name; an unknown one raises `OptionError`."""
    if name not in TABLES:
        raise OptionError(f"unknown table {name!r}{nearest(name, TABLES)}; known are {', '.join(TABLES)}")
    return TABLES[name]


def _plain(suite: Suite, names: Sequence[str]) -> list[Row]:
    return [Row(name, name) for name in names]


def _parts(parts: Mapping[str, Mapping[str, Any]]) -> Callable[[Suite, Sequence[str]], list[Row]]:
    """One row for each set of options."""

    def rows(suite: Suite, names: Sequence[str]) -> list[Row]:
        return [
            Row(_label(name, names, label), name, options, series=label)
            for name in names
            for label, options in parts.items()
        ]

    return rows


def _additions(suite: Suite, names: Sequence[str]) -> list[Row]:
    return [Row(label, method, options, series=label) for label, (method, options) in _ADDITIONS.items()]


def _sweep(option: str, *values: float) -> Callable[[Suite, Sequence[str]], list[Row]]:
    def rows(suite: Suite, names: Sequence[str]) -> list[Row]:
        return [
            Row(f"{name}, {option} {value:g}", name, {option: value}, None, name, value)
            for name in names
            for value in values
        ]

    return rows


def _samples(suite: Suite, names: Sequence[str]) -> list[Row]:
    return [
        Row(f"{name}, {count} per class", name, {}, count, name, count)
        for name in names
        for count in (1, 3, 5)
    ]


def _layers_and_rank(suite: Suite, names: Sequence[str]) -> list[Row]:
    """The task type's layer sets, each with every rank up to the largest that its matrices allow."""
    task, rows = tasks.get(suite.task_type), []
    model = task.skeleton(suite.base)
    tower, structure = model.get_submodule(task.tower(model)), task.structure(model)
    for name in names:
        for layers in filter(structure.sets.get, _LAYER_SETS):
            targets = structure.sets[layers]
            largest = max(min(layer.weight.shape) for layer in find_targets(tower, targets).values())
            for rank in sorted({min(rank, largest) for rank in (*_RANKS, largest)}):
                series = _label(name, names, layers)
                rows.append(
                    Row(f"{series}, rank {rank}", name, {"layers": targets, "rank": rank}, None, series, rank)
                )
    return rows


def _label(method: str, names: Sequence[str], label: str) -> str:
    """The label, with the method's name where there are several."""
    return f"{method}, {label}" if len(names) > 1 else label


def _independent() -> tuple[str, ...]:
    """All methods that merge models fine-tuned from the base."""
    return tuple(name for name, method in METHODS.items() if not method.sequential)


def _all() -> tuple[str, ...]:
    return tuple(METHODS)


def _corrupted(name: str) -> tuple[str, ...]:
    """The clean suite and one suite per corruption."""
    from mingle.suites import glyphs

    corrupted = tuple(
        other for other in glyphs.NAMES if other.startswith(f"{name}-") and other != f"{name}-corrupted"
    )
    return (name, *corrupted)


_CLIP = tuple(f"clip-{size}-{count}" for size in ("b32", "b16", "l14") for count in (8, 14, 20))
_CLIP_B16 = tuple(f"clip-b16-{count}" for count in (8, 14, 20))

TABLES: dict[str, Table] = {
    "main": Table("all methods", _plain, _independent, _CLIP),
    "corruptions": Table(
        "all methods on corrupted images",
        _plain,
        _independent,
        tuple(paper.CORRUPTIONS),
        suites=_corrupted,
    ),
    "mtil": Table("all methods on tasks of many domains", _plain, _all, ("mtil-11",)),
    "glue": Table("all methods on language tasks", _plain, _independent, ("glue-8",)),
    "ablation": Table("the parts of MINGLE, one by one", _parts(_ABLATION), published=_CLIP_B16),
    "router": Table(
        "the choices behind the routed experts, one by one", _parts(_ROUTER), lambda: ("routed",)
    ),
    "additions": Table("MINGLE with what this library adds to it, each alone", _additions),
    "steps": Table(
        "adaptation steps", _sweep("steps", 5, 10, 20, 50), published=_CLIP_B16, axis="adaptation steps"
    ),
    "layers-and-rank": Table(
        "target layers and rank of the experts", _layers_and_rank, published=_CLIP_B16, axis="rank"
    ),
    "samples": Table("seed samples per class", _samples, published=_CLIP_B16, axis="seed samples per class"),
    "gamma": Table(
        "strength γ of the relaxation",
        _sweep("gamma", 0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        published=_CLIP_B16,
        axis="γ",
    ),
    "beta": Table(
        "memory β of the interference",
        _sweep("beta", 0.0, 0.5, 0.9, 0.99, 0.999),
        published=_CLIP_B16,
        axis="β",
    ),
    "k": Table(
        "protected directions k of every task", _sweep("k", 1, 2, 3, 5, 8), published=_CLIP_B16, axis="k"
    ),
}
