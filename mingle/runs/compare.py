"""A comparison of methods on the same sequences of tasks, evaluated after each merge, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from mingle import methods, suites, tasks
from mingle.io.files import free_space, without_nan, writable, write_json
from mingle.io.manifest import MANIFEST, read_manifest, size_of
from mingle.io.provenance import versions
from mingle.merging.merger import Merger
from mingle.runs import report, room, settings
from mingle.runs.loop import MergeStep, experts_of, merge_all
from mingle.runs.observer import Observer
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.runs.origin import origin
from mingle.runs.report import page
from mingle.runs.traces import trace_of
from mingle.suites import Suite


@dataclass(frozen=True)
class Comparison:
    """A request for a comparison.

    Attributes:
        suite: see `mingle.suites.load`.
        protocol: ``strict`` or ``official``.
        methods: names in `mingle.methods.METHODS`.
        orders: how many task orders, by the seeds 42, 43, …
        samples_per_class: seed samples per class.
        seed: of seed samples, gates and batches.
        options: method options that replace the suite's own settings; each method takes those it knows.
    """

    suite: str = "glyphs8"
    protocol: str = "strict"
    methods: tuple[str, ...] = (
        "pre-trained",
        "individual",
        "average",
        "task-arithmetic",
        "opcm",
        "mingle",
        "mingle-light",
        "routed",
    )
    orders: int = 1
    samples_per_class: int = 5
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def options_for(self, method: str, suite: Suite) -> dict[str, Any]:
        """All options of one of the methods."""
        given = settings.known(method, dict(self.options))
        return settings.for_suite(method, suite, given)


def run(comparison: Comparison, out: Path, observer: Observer | None = None) -> dict[str, Any]:
    """Run every method and write the folder `out`.

    The folder holds ``config.yaml``, ``results.json``, ``accuracy_matrix.csv``, ``timings.json``,
    ``traces.json``, the plots, ``report.html``, and under ``merged/`` every method's merged model of the
    first order.

    Returns:
        What ``results.json`` holds.
    """
    writable(out)
    observer = observer or Observer()
    suite = _prepared(comparison, observer)
    _check_room(comparison, suite, out / "merged")
    out.mkdir(parents=True, exist_ok=True)
    asked = asdict(comparison) | {"methods": list(comparison.methods), "options": dict(comparison.options)}
    (out / "config.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    for name in suite:
        suite.expert(name)  # a missing one is fetched or trained before anything is timed
    results: dict[str, Any] = {
        "suite": comparison.suite,
        "protocol": comparison.protocol,
        "seed": comparison.seed,
        "versions": versions(),
        "methods": {},
    }
    timings: dict[str, Any] = {}
    traces: dict[str, Any] = {}
    for method in comparison.methods:
        keys = ("acc", "acc_unknown", "bwt", "matrix", "unknown", "answers", "order", "seconds")
        rows: dict[str, Any] = {key: [] for key in keys}
        results["methods"][method] = rows
        timings[method] = []
        for number in range(comparison.orders):
            merger, steps = _merged(comparison, method, suite, number, observer)
            _note(rows, merger, steps)
            timings[method].append(
                [{"task": step.task, "merge": step.merge, "evaluate": step.evaluate} for step in steps]
            )
            if number == 0:
                if trace := trace_of(merger, suite, steps):
                    traces[method] = trace
                if method not in report.REFERENCES:
                    merger.save_pretrained(out / "merged" / method)
                    rows["bytes"] = size_of(read_manifest(out / "merged" / method))
            observer.merged(method, number, merger.result())
        _write(out / "results.json", results)
        _write(out / "timings.json", timings)
    _write(out / "traces.json", traces)
    report.write_csv(results, out / "accuracy_matrix.csv")
    report.write_plots(results, traces, out)
    page.write(out)
    return results


def _check_room(comparison: Comparison, suite: Suite, merged: Path) -> None:
    """Refuse a disk without room for the merged models, and folders of theirs that something else is in."""
    needed = 0
    for method in comparison.methods:
        if method not in report.REFERENCES:
            size = room.of_merge(
                method, comparison.options_for(method, suite), suite.base, tasks.get(suite.task_type)
            )
            needed += size.base + size.task * len(suite) + size.state
            if (merged / method / MANIFEST).exists():
                read_manifest(merged / method)
                needed -= size.base
    free_space(merged, needed)


def _prepared(comparison: Comparison, observer: Observer) -> Suite:
    """The suite, once every method is known to run on it."""
    suite = suites.load(
        comparison.suite,
        protocol=comparison.protocol,
        samples_per_class=comparison.samples_per_class,
        seed=comparison.seed,
        on_training=observer.training,
    )
    for method in comparison.methods:
        comparison.options_for(method, suite)
        if methods.get(method).sequential:
            suite.check_sequential()
    for name in suite:
        suite.check(name)
    return suite


def _merged(
    comparison: Comparison, method: str, suite: Suite, number: int, observer: Observer
) -> tuple[Merger, list[MergeStep]]:
    """All tasks merged by one method, in one order."""
    options = comparison.options_for(method, suite)
    merger = Merger(suite.base, method, suite.task_type, seed=comparison.seed, **options)
    merger.metadata = origin(
        comparison.suite, comparison.protocol, comparison.samples_per_class, revisions=suite.revisions
    )
    order = shuffled(suite, FIRST_ORDER_SEED + number)
    expert = experts_of(suite, sequential=merger.method.sequential)
    return merger, list(merge_all(merger, order, expert, suite, observer, number))


def _note(rows: dict[str, Any], merger: Merger, steps: Sequence[MergeStep]) -> None:
    """Append the results of one order to a method's rows."""
    result, tasks = merger.result(), merger.task_names
    rows["acc"].append(result.acc)
    rows["acc_unknown"].append(result.acc_unknown)
    rows["bwt"].append(result.bwt)
    for key, matrix in (("matrix", result.matrix), ("unknown", result.unknown)):
        rows[key].append([row + [None] * (len(tasks) - len(row)) for row in matrix])
    rows["answers"].append({name: each.noted() for name, each in result.answers.items()})
    rows["order"].append(tasks)
    rows["seconds"].append(round(sum(step.merge for step in steps), 3))


def _write(path: Path, value: dict[str, Any]) -> None:
    write_json(path, without_nan(value), sort_keys=False)  # methods stay in the order asked for
