"""The command line: ``python -m mingle demo | reproduce | check | merge | add | eval | inspect | export |
report | bench | env``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from mingle.adaptation.train import AdaptationDiverged, StepProgress
from mingle.io import merger_folder, provenance
from mingle.merging.evaluate import Result
from mingle.merging.merger import Merger
from mingle.methods import METHODS
from mingle.options import OptionError
from mingle.runs import compare as experiments
from mingle.runs import config as configs
from mingle.runs import merge, report, reproduce
from mingle.runs.reproduce import summary
from mingle.runs.reproduce.tables import TABLES
from mingle.suites.protocol import PROTOCOLS

console = Console()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.  Returns 0, 1 where a benchmark found a fault, or 2 after a message where the input
    was wrong.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would break ours
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    args = _parser().parse_args(arguments)
    if getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return args.run(args) or 0
    except (ValueError, AdaptationDiverged, FileNotFoundError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    defaults = experiments.Experiment()
    parser = argparse.ArgumentParser(prog="mingle", description="Merge fine-tuned models one after another.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="compare methods on an embedded suite, from nothing, in a few minutes"
    )
    demo.add_argument(
        "--suite",
        default=defaults.suite,
        help="glyphs4, glyphs8, glyphs20, glyphs8-shared, glyphs4-corrupted, …",
    )
    demo.add_argument("--protocol", default=defaults.protocol, choices=PROTOCOLS)
    demo.add_argument(
        "--methods", default=",".join(defaults.methods), help=f"comma-separated, of: {', '.join(METHODS)}"
    )
    demo.add_argument("--orders", type=_positive, default=1, help="how many task orders (seeds 42, 43, …)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a method option, such as steps=100 or constraint=hard",
    )
    demo.set_defaults(run=_demo)

    tables = commands.add_parser(
        "reproduce", help="measure a table of the paper; resumes what was interrupted, and shares the work"
    )
    tables.add_argument("table", help=", ".join(TABLES))
    tables.add_argument(
        "--suite", type=_names, default=("glyphs8",), metavar="A,B", help="suites, or: published"
    )
    tables.add_argument("--protocol", default="strict", choices=(*PROTOCOLS, "both"))
    tables.add_argument(
        "--methods", type=_names, default=(), metavar="A,B", help="instead of the table's own"
    )
    tables.add_argument("--orders", type=_positive, default=1, help="how many task orders (seeds 42, 43, …)")
    tables.add_argument("--samples-per-class", type=_positive, default=5, help="seed samples")
    tables.add_argument("--seed", type=int, default=0)
    tables.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a method option, such as steps=100"
    )
    tables.add_argument(
        "--evaluate",
        default="ends",
        choices=reproduce.EVALUATE,
        help="what ACC and BWT need, or the whole matrix",
    )
    tables.add_argument("--out", type=Path, help="default: runs/reproduce-<table>")
    tables.add_argument("--keep-models", action="store_true", help="keep every merged model")
    tables.add_argument(
        "--threads",
        type=_positive,
        help="of the CPU; several processes of one thread share small models best",
    )
    tables.set_defaults(run=_reproduce)

    merge = commands.add_parser("merge", help="merge the models of a YAML file; resumes what was interrupted")
    merge.add_argument("config", type=Path)
    merge.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    merge.set_defaults(run=_merge)

    check = commands.add_parser(
        "check", help="find out whether merge would run: the YAML file and every file it names"
    )
    check.add_argument("config", type=Path)
    check.set_defaults(run=_check)

    add = commands.add_parser("add", help="merge one more model into a merged one")
    add.add_argument("folder", type=Path, help="what merge wrote")
    add.add_argument("--name", required=True, help="of the task")
    add.add_argument("--model", required=True, help="the fine-tuned model: a local folder or a hub id")
    add.add_argument("--revision", help="of a hub model")
    _suite_arguments(add)
    add.set_defaults(run=_add)

    evaluate = commands.add_parser("eval", help="accuracy of a merged model on all of its tasks")
    evaluate.add_argument("folder", type=Path, help="what merge wrote")
    evaluate.add_argument("--batch-size", type=_positive, default=128)
    _suite_arguments(evaluate)
    evaluate.set_defaults(run=_eval)

    inspect = commands.add_parser("inspect", help="what a merged model's folder holds")
    inspect.add_argument("folder", type=Path)
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser(
        "export", help="a merged model as a plain Hugging Face folder, which transformers loads"
    )
    export.add_argument("folder", type=Path, help="what merge wrote")
    export.add_argument("--out", type=Path, required=True, help="a new folder")
    export.add_argument("--task", help="whose model, for the method individual")
    export.set_defaults(run=_export)

    again = commands.add_parser("report", help="table and plots of a run folder, made again")
    again.add_argument("folder", type=Path, help="what demo wrote")
    again.set_defaults(run=_report)

    # no character starts an option here, so that every argument reaches the benchmark's own parser
    bench = commands.add_parser(
        "bench", help="time the kernels against other ways to compute them", add_help=False, prefix_chars="\0"
    )
    bench.add_argument("arguments", nargs="*")
    bench.set_defaults(run=_bench)

    env = commands.add_parser("env", help="versions and what computes here, for bug reports")
    env.set_defaults(run=_env)
    for command in (demo, tables, merge, check, add, evaluate):
        command.add_argument(
            "--offline", action="store_true", help="take hub models and data sets from the hub's cache only"
        )
    return parser


def _suite_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", help="where samples come from; by default the one used before")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="by default the one used before")
    parser.add_argument(
        "--samples-per-class", type=_positive, help="seed samples; by default as many as before"
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected a positive number")
    return value


def _demo(args: argparse.Namespace) -> None:
    names = _names(args.methods)
    options = tuple(_option(text) for text in args.set)
    experiment = experiments.Experiment(
        args.suite, args.protocol, names, args.orders, seed=args.seed, options=options
    )
    with _progress() as progress:
        results = experiments.run(experiment, args.out, _Bars(progress, len(names) * args.orders))
    console.print(report.table(results))
    console.print(f"results, plots and merged models: [bold]{args.out}[/]")


def _reproduce(args: argparse.Namespace) -> None:
    import torch

    request = reproduce.Request(
        args.table,
        suites=args.suite,
        protocols=tuple(PROTOCOLS) if args.protocol == "both" else (args.protocol,),
        orders=args.orders,
        methods=args.methods,
        options=tuple(_option(text) for text in args.set),
        samples_per_class=args.samples_per_class,
        seed=args.seed,
        evaluate=args.evaluate,
    )
    plan, out = reproduce.plan(request), args.out or Path("runs") / f"reproduce-{args.table}"
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with _progress() as progress:
            unfinished = sum(cell.result(out / "cells") is None for cell in plan.cells)
            reproduce.run(plan, out, _Bars(progress, unfinished), keep_models=args.keep_models)
    finally:  # what is finished is worth a table whatever ended the run
        for table in report.comparison.tables(summary.write(plan, out)):
            console.print(table)
        console.print(f"table and plots: [bold]{out}[/]")


def _option(text: str) -> tuple[str, Any]:
    import yaml

    name, separator, value = text.partition("=")
    known = sorted(
        {field for method in METHODS.values() for field in vars(method.Options)["__dataclass_fields__"]}
    )
    if not separator:
        raise OptionError(f"--set {text}: expected NAME=VALUE")
    if name not in known:
        raise OptionError(f"--set {name}: no method has this option; known are {', '.join(known)}")
    return name, yaml.safe_load(value)


def _merge(args: argparse.Namespace) -> None:
    plan = merge.check(configs.load(args.config), args.out)
    with _progress() as progress:
        for result in plan.run(_Bars(progress, len(plan.orders))):
            console.print(_result_table(result))
    console.print(f"merged model: [bold]{args.out}[/]")


def _check(args: argparse.Namespace) -> None:
    plan = merge.check(configs.load(args.config))
    console.print(f"{args.config}: all {len(plan.experts)} experts fit the base")


def _add(args: argparse.Namespace) -> None:
    with _progress() as progress:
        result = merge.add(
            args.folder,
            configs.Expert(args.name, args.model, args.revision),
            _overrides(args),
            _Bars(progress, 1),
        )
    console.print(_result_table(result))


def _eval(args: argparse.Namespace) -> None:
    console.print(_result_table(merge.evaluate(args.folder, _overrides(args), args.batch_size)))


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {"suite": args.suite, "protocol": args.protocol, "samples_per_class": args.samples_per_class}
    return {name: value for name, value in given.items() if value is not None}


def _inspect(args: argparse.Namespace) -> None:
    manifest = merger_folder.load(args.folder).manifest
    table = Table(
        title=f"{args.folder}: {manifest['method']}, {len(manifest['tasks'])} tasks", title_justify="left"
    )
    for column in ("task", "seed samples", "accuracy when merged", "accuracy now", "bytes", "notes"):
        table.add_column(column, justify="left" if column in ("task", "notes") else "right")
    for i, task in enumerate(manifest["tasks"]):
        measured = [manifest["matrix"][row][i] if manifest["matrix"] else None for row in (i, -1)]
        size = task["tensors"]["bytes"] if task["tensors"] else 0
        notes = "; ".join([task["skipped"] or "", *task["notes"]]).strip("; ")
        table.add_row(
            task["name"], str(task["seed_samples"]), *(_percent(m) for m in measured), f"{size:,}", notes
        )
    console.print(table)
    console.print(
        f"base SHA-256 {manifest['base']['sha256'][:16]}…, options {json.dumps(manifest['options'])}",
        soft_wrap=True,
    )


def _export(args: argparse.Namespace) -> None:
    Merger.from_pretrained(args.folder).export(args.out, args.task)
    console.print(f"plain model: [bold]{args.out}[/]")


def _report(args: argparse.Namespace) -> None:
    results = json.loads((args.folder / "results.json").read_text())
    traces = json.loads((args.folder / "traces.json").read_text())
    report.write_csv(results, args.folder / "accuracy_matrix.csv")
    report.write_plots(results, traces, args.folder)
    console.print(report.table(results))


def _bench(args: argparse.Namespace) -> int:
    from mingle.bench.run import main

    status: int = main(args.arguments)
    return status


def _env(args: argparse.Namespace) -> None:
    import torch

    from mingle.kernels import gemm
    from mingle.ops import dispatch, extension

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = dispatch.without_triton(device, torch.float32)
    facts = provenance.versions() | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "triton": f"not used: {missing}" if missing else "used where it is the faster backend",
        "extension": extension.summary(),
        "cpu products": gemm.library(1024, 1024, 1024) + " (fp32, large)",
    }
    for name, value in facts.items():
        console.print(f"{name:14}{value}", highlight=False, markup=False, soft_wrap=True)


def _result_table(result: Result) -> Table:
    table = Table(title=f"ACC {_percent(result.acc)}, BWT {_points(result.bwt)}", title_justify="left")
    table.add_column("task")
    table.add_column("when merged", justify="right")
    table.add_column("now", justify="right")
    for j, name in enumerate(result.tasks):
        table.add_row(name, _percent(result.matrix[j][j]), _percent(result.matrix[-1][j]))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1f} %"


def _points(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1f}"


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        yield progress


class _Bars(experiments.Observer):
    """A bar for the tasks of all methods and orders, and one for what runs inside a task."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.runs, self.begun = progress, runs, 0
        self.tasks = progress.add_task("starting", total=None, note="")
        self.inner = progress.add_task("", total=None, note="", visible=False)

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        self.progress.update(
            self.tasks,
            description=f"{method}, order {order + 1}",
            total=self.runs * len(tasks),
            completed=self.begun,
            note=tasks[index],
        )
        self.progress.update(self.inner, visible=False)
        self.begun += 1

    def adapting(self, progress: StepProgress) -> None:
        note = f"loss {progress.loss:.3f}"
        if progress.strength is not None:
            note += f"  S {progress.interference:.3f}  λ {progress.strength:.3f}"
        self.progress.update(
            self.inner,
            description="  adapting",
            visible=True,
            total=progress.steps,
            completed=progress.step,
            note=note,
        )

    def training(self, task: str, step: int, steps: int) -> None:
        description = f"  training the expert {task} (once, then cached)"
        self.progress.update(self.inner, description=description, visible=True, total=steps, completed=step)

    def merged(self, method: str, order: int, result: Result) -> None:
        self.progress.update(self.tasks, completed=self.begun)
        self.progress.console.print(
            f"{method}, order {order + 1}: ACC {_percent(result.acc)}, BWT {_points(result.bwt)}"
        )
