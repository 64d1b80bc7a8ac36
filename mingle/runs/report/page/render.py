"""A page as HTML."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mingle.runs.report.numbers import is_known, mean_of, number
from mingle.runs.report.page import advice, cards, charts, heat
from mingle.runs.report.page.model import Group, Page, Row
from mingle.text import shortened, visible

#: the most rows that are shown in detail, the most accurate first, and the most tasks in all of these
MOST_DETAILS, MOST_TASKS = 24, 160
#: the longest text of a fact
_FACT_LENGTH = 2000


@dataclass(frozen=True)
class _Detail:
    """A row in detail; `anchor` is its place in the page."""

    anchor: str
    row: Row
    group: Group


def html(page: Page) -> str:
    """The page as one HTML document, which needs nothing else."""
    details = _details(page)
    first = next((each for each in details if each.row is each.group.best()), details[0] if details else None)
    return _template().render(
        page=page,
        title=f"mingle {page.command}: {shortened(page.subject)}",
        style=Markup(_text("style.css")),
        script=Markup(_text("script.js")),
        script_hash=_digest(_text("script.js")),
        details=details,
        first=first,
        anchor_of={id(each.row): each.anchor for each in details}.get,
        left_out=sum(len(group.rows) for group in page.groups) - len(details),
        identity=id,
        advice=advice,
        cards=cards,
        charts=charts,
        heat=heat,
    )


def _details(page: Page) -> list[_Detail]:
    """The rows that are shown in detail, in the order of the tables."""
    rows = [row for row, _ in _ranked(page)][:MOST_DETAILS]
    tasks = itertools.accumulate(0 if row.course is None else len(row.course.tasks) for row in rows)
    chosen = {
        id(row) for row, count in zip(rows, tasks, strict=True) if count <= MOST_TASKS or row is rows[0]
    }
    every = [(row, group) for group in page.groups for row in group.rows if id(row) in chosen]
    return [_Detail(f"row-{number}", row, group) for number, (row, group) in enumerate(every, start=1)]


def _ranked(page: Page) -> Iterator[tuple[Row, Group]]:
    """Rows of which there is something to show, each group's most accurate first, by turns."""
    ranked = []
    for group in page.groups:
        rows = [row for row in group.rows if row.course is not None or row.failed]
        rows.sort(key=lambda row: -mean if is_known(mean := mean_of(row.acc)) else 1.0)
        ranked += [(place, row, group) for place, row in enumerate(rows)]
    for _, row, group in sorted(ranked, key=lambda each: each[0]):
        yield row, group


def _name(text: str, length: int = 60) -> Markup:
    """A name that came from somewhere else: shortened, and with a direction of its own."""
    return Markup("<bdi>") + escape(shortened(text, length)) + Markup("</bdi>")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "name": _name,
        "short": shortened,
        "shown": lambda text: shortened(text, _FACT_LENGTH),
        "whole": visible,
        "size": cards.readable,
        "number": number,
        "place": lambda value: f"{value:.4g}",
    }
    environment.filters.update(filters)
    return environment.get_template("page.html.j2")
