"""A request for a table, planned as a whole: every mistake is found before the first merge."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from mingle import methods, suites
from mingle.options import OptionError
from mingle.runs import settings
from mingle.runs.loop import Evaluate
from mingle.runs.orders import FIRST_ORDER_SEED
from mingle.runs.reproduce import tables
from mingle.runs.reproduce.cells import Cell
from mingle.runs.reproduce.tables import Row, Table
from mingle.suites import Suite

EVALUATE: tuple[Evaluate, ...] = ("ends", "every")


@dataclass(frozen=True)
class Request:
    """A table that the user asks for.

    Attributes:
        table: a name in `tables.TABLES`.
        suites: names as `mingle.suites.load` knows them, or ``published`` for all those for which the paper
            shows this table.
        protocols: one table each.
        orders: how many task orders, by the seeds 42, 43, …
        methods: the methods compared or swept; empty takes the table's own.
        options: method options that replace the suites' and the published settings; each method takes those
            it knows.
        samples_per_class: see `mingle.suites.load`.
        seed: of seed samples, gates and batches.
        evaluate: ``ends`` or ``every``, see `mingle.runs.loop`.
    """

    table: str
    suites: tuple[str, ...] = ("glyphs8",)
    protocols: tuple[str, ...] = ("strict",)
    orders: int = 1
    methods: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    samples_per_class: int = 5
    seed: int = 0
    evaluate: Evaluate = "ends"


@dataclass(frozen=True)
class Entry:
    """A row of the table on one suite under one protocol: one cell per order."""

    row: Row
    protocol: str
    suite: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class TablePlan:
    """A request without mistakes, ready to run."""

    request: Request
    table: Table
    entries: tuple[Entry, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells, each once, in running order: all rows of one task order before the next."""
        groups = itertools.groupby(self.entries, key=lambda entry: (entry.protocol, entry.suite))
        ordered = [
            cell
            for _, group in groups
            for row in zip(*(entry.cells for entry in group), strict=True)
            for cell in row
        ]
        return list({cell.folder_name: cell for cell in ordered}.values())


def plan(request: Request) -> TablePlan:
    """The plan of a request, whose mistakes are all found here, before the first merge.

    Raises:
        OptionError: an unknown table, suite, protocol, method or option, or an impossible value.
    """
    table = tables.get(request.table)
    if request.evaluate not in EVALUATE:
        raise OptionError(f"evaluate: {request.evaluate!r}; expected one of {', '.join(EVALUATE)}")
    names = [
        each
        for name in request.suites
        for each in (table.published if name == "published" else table.suites(name))
    ]
    entries = []
    for protocol, name in itertools.product(dict.fromkeys(request.protocols), dict.fromkeys(names)):
        suite = suites.load(
            name, protocol=protocol, samples_per_class=request.samples_per_class, seed=request.seed
        )
        chosen = _methods(request, table, suite)
        rows = table.rows(suite, chosen)
        _refuse_idle(request, rows)
        entries += [Entry(row, protocol, name, _cells(request, row, suite)) for row in rows]
    return TablePlan(request, table, tuple(entries))


def _methods(request: Request, table: Table, suite: Suite) -> tuple[str, ...]:
    """The methods asked for, or those of the table's own that the suite can run."""
    chosen = request.methods or table.methods()
    sequential = {method for method in chosen if methods.get(method).sequential}
    try:
        if sequential:
            suite.check_sequential()
    except OptionError:
        if request.methods:
            raise
        return tuple(method for method in chosen if method not in sequential)
    return chosen


def _refuse_idle(request: Request, rows: Sequence[Row]) -> None:
    """Refuse options without effect: no method of the table takes them, or the table varies them itself."""
    known = {field.name for row in rows for field in fields(methods.get(row.method).Options)}
    for name, _ in request.options:
        if name not in known:
            raise OptionError(f"option {name!r}: no method of this table has it")
        if any(name in row.options for row in rows):
            raise OptionError(f"option {name!r}: the table {request.table!r} varies it itself")


def _cells(request: Request, row: Row, suite: Suite) -> tuple[Cell, ...]:
    given = settings.known(row.method, dict(request.options)) | dict(row.options)
    try:
        options = settings.for_suite(row.method, suite, given)
    except OptionError as error:
        raise OptionError(f"row {row.label!r}: {error}") from None
    samples = row.samples_per_class or request.samples_per_class
    seeds = range(FIRST_ORDER_SEED, FIRST_ORDER_SEED + request.orders)
    protocol = suite.request.protocol
    return tuple(
        Cell(suite.name, protocol, row.method, options, order, samples, request.seed, request.evaluate)
        for order in seeds
    )
