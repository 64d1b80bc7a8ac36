"""``mingle check``: whether a merge would run, and what it would do and take."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mingle.cli import arguments
from mingle.cli.arguments import Commands
from mingle.cli.output import document, line, method_name, show
from mingle.io.files import file_path
from mingle.runs import costs
from mingle.runs.check import plan_of
from mingle.runs.costs import Costs
from mingle.runs.merge import MergePlan
from mingle.text import visible


def register(commands: Commands) -> None:
    parser = commands.add_parser(
        "check", help="find out whether merge would run, what it would do, and what it would take"
    )
    parser.add_argument("config", type=file_path)
    arguments.offline(parser)
    arguments.printing(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = plan_of(args.config)
    found = costs.of_plan(plan)
    show(
        line("method: ", method_name(plan.config.method)),
        line("base: ", f"{plan.base}, {plan.task.name}, {_size(costs.size_of(plan.base))}"),
        _tasks(plan),
        *(line(f"{name}: {text}") for name, lines in plan.left.items() for text in lines),
        *([_settings(plan)] if plan.options else []),
        *_lines(plan, found),
        line(f"{args.config}: all {len(plan.experts)} experts fit the base"),
    )
    document({"config": str(args.config), **_document(plan, found)})


def _tasks(plan: MergePlan) -> Table:
    """The models, in the first order."""
    table = _table("task", "model", "size")
    table.columns[2].justify = "right"
    for name in plan.orders[0]:
        model = plan.experts[name]
        table.add_row(*map(visible, (name, str(model), _size(costs.size_of(model)))))
    return table


def _settings(plan: MergePlan) -> Table:
    table = _table("option", "value", "from")
    for name, value in plan.options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(*map(visible, (name, text, plan.sources[name])))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _lines(plan: MergePlan, found: Costs) -> Iterator[Text]:
    """What is measured, in which orders, and what all of it takes."""
    others = [", ".join(order) for order in plan.orders[1:]]
    yield from (line("then in the order: ", order) for order in others)
    evaluation = plan.config.eval
    if plan.suite is None:
        yield line("measured: ", "nothing, as no suite is named")
    else:
        when = "after every merge" if evaluation.every_step else "after the last merge"
        count = costs.evaluations(plan)
        samples = "" if count is None else f", {count:,} samples in all"
        protocol = f"protocol {plan.config.adapt.protocol}"
        yield line("measured: ", f"{when}, on the suite {plan.suite.name}, {protocol}{samples}")
    yield line("disk: ", _sum(found.disk))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    more = "" if plan.forecast else ", and what the method computes with"
    if not plan.forecast and "base" not in found.memory:
        more += ", while the base and the fine-tuned models stay in their files"
    yield line("memory: ", f"{_sum(found.memory)}{more}; of {_size(memory)}")
    if plan.forecast:
        yield line("files: ", f"{_size(plan.forecast.read)} to read, {_size(plan.forecast.written)} to write")
    yield line("time: ", _time(found.seconds))


def _sum(parts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    return f"about {_size(sum(parts.values()))}: {listed}"


def _time(seconds: Mapping[str, float]) -> str:
    known = {name: part for name, part in seconds.items() if part > 0}
    listed = ", ".join(f"{name} {timedelta(seconds=math.ceil(part))}" for name, part in known.items())
    unknown = ", ".join(name for name, part in seconds.items() if math.isnan(part))
    more = f", and an unknown time for {unknown}" if unknown else ""
    whole = timedelta(seconds=math.ceil(sum(known.values())))
    return f"roughly {whole}: {listed}{more}, and what the method computes with weights"


def _size(count: int) -> str:
    """With three digits and a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.{max(0, 3 - len(str(int(count / factor))))}f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _document(plan: MergePlan, found: Costs) -> dict[str, Any]:
    names = {name: str(folder) for name, folder in plan.experts.items()}
    measured = None
    if plan.suite is not None:
        measured = {
            "suite": plan.suite.name,
            "protocol": plan.config.adapt.protocol,
            "every_step": plan.config.eval.every_step,
            "test_samples": {name: plan.suite.size(name) for name in names},
            "samples": costs.evaluations(plan),
        }
    return {
        "base": {"folder": str(plan.base), "task_type": plan.task.name, "bytes": costs.size_of(plan.base)},
        "method": plan.config.method,
        "settings": {
            name: {"value": value, "from": plan.sources[name]} for name, value in plan.options.items()
        },
        "orders": plan.orders,
        "experts": {
            name: {
                "folder": folder,
                "bytes": costs.size_of(plan.experts[name]),
                "left": plan.left.get(name, []),
            }
            for name, folder in names.items()
        },
        "evaluation": measured,
        "costs": asdict(found),
        "forecast": plan.forecast and asdict(plan.forecast),
    }
