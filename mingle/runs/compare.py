"""A comparison of methods on the same sequences of tasks, evaluated after each merge, in one folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mingle import methods, suites, tasks
from mingle.io.base_files import base_files
from mingle.io.files import free_space, without_nan, writable, write_json
from mingle.io.manifest import MANIFEST, read_manifest, size_of
from mingle.io.provenance import versions
from mingle.merging.evaluate import Result
from mingle.merging.merger import Merger
from mingle.runs import report, room, settings
from mingle.runs.loop import MergeStep, experts_of, merge_all
from mingle.runs.observer import Observer
from mingle.runs.orders import FIRST_ORDER_SEED, shuffled
from mingle.runs.origin import origin
from mingle.runs.processes import side_by_side
from mingle.runs.report import page
from mingle.runs.traces import trace_of
from mingle.suites import OnTraining, Suite

#: of a method's rows in ``results.json``, one entry per order
_KEYS = ("acc", "acc_unknown", "bwt", "matrix", "unknown", "answers", "order", "seconds")
#: bytes of a base; several merges of larger ones may not fit into memory, and all cores work on one
_SMALL = 200_000_000


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
        "routed",
    )
    orders: int = 1
    samples_per_class: int = 5
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def load(self, on_training: OnTraining | None = None) -> Suite:
        """The suite; see `mingle.suites.load`."""
        return suites.load(
            self.suite,
            protocol=self.protocol,
            samples_per_class=self.samples_per_class,
            seed=self.seed,
            on_training=on_training,
        )

    def options_for(self, method: str, suite: Suite) -> dict[str, Any]:
        """All options of one of the methods."""
        given = settings.known(method, dict(self.options))
        return settings.for_suite(method, suite, given)


class _Job(NamedTuple):
    """One method, in the order of that number."""

    method: str
    number: int


class _Place(NamedTuple):
    """What all jobs of a process share."""

    comparison: Comparison
    suite: Suite
    out: Path


class _Measured(NamedTuple):
    """What a job finds; `bytes` of its merged model, where that is saved."""

    result: Result
    steps: list[MergeStep]
    trace: dict[str, Any]
    bytes: int | None


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
    jobs = [_Job(method, number) for method in comparison.methods for number in range(comparison.orders)]
    small = sum(file.stat().st_size for file in base_files(suite.base)) < _SMALL
    measured = side_by_side(
        jobs,
        _measured,
        _Place(comparison, suite, out),
        partial(_placed, comparison, out),
        observer,
        processes=len(jobs) if small else 1,
        long=lambda job: methods.get(job.method).needs_seeds,
    )
    for job, found in zip(jobs, measured, strict=True):
        rows = results["methods"].setdefault(job.method, {key: [] for key in _KEYS})
        _note(rows, found)
        timings.setdefault(job.method, []).append(
            [{"task": step.task, "merge": step.merge, "evaluate": step.evaluate} for step in found.steps]
        )
        if found.trace:
            traces[job.method] = found.trace
        if found.bytes is not None:
            rows["bytes"] = found.bytes
        if job.number + 1 == comparison.orders:
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
            needed += size.base + size.saved_once(len(suite))
            if (merged / method / MANIFEST).exists():
                read_manifest(merged / method)
                needed -= size.base
    free_space(merged, needed)


def _prepared(comparison: Comparison, observer: Observer) -> Suite:
    """The suite, once every method is known to run on it."""
    suite = comparison.load(observer.training)
    for method in comparison.methods:
        comparison.options_for(method, suite)
        if methods.get(method).sequential:
            suite.check_sequential()
    for name in suite:
        suite.check(name)
    return suite


def _placed(comparison: Comparison, out: Path) -> _Place:
    """The same in another process, where everything has been checked."""
    return _Place(comparison, comparison.load(), out)


def _measured(place: _Place, job: _Job, observer: Observer) -> _Measured:
    """All tasks merged by one method, in one order; the first order's merged model is saved."""
    comparison, suite = place.comparison, place.suite
    options = comparison.options_for(job.method, suite)
    merger = Merger(suite.base, job.method, suite.task_type, seed=comparison.seed, **options)
    merger.metadata = origin(
        comparison.suite, comparison.protocol, comparison.samples_per_class, revisions=suite.revisions
    )
    order = shuffled(suite, FIRST_ORDER_SEED + job.number)
    expert = experts_of(suite, sequential=merger.method.sequential)
    steps = list(merge_all(merger, order, expert, suite, observer, job.number))
    trace, size = {}, None
    if job.number == 0:
        trace = trace_of(merger, suite, steps)
        if job.method not in report.REFERENCES:
            merger.save_pretrained(place.out / "merged" / job.method)
            size = size_of(read_manifest(place.out / "merged" / job.method))
    observer.merged(job.method, job.number, merger.result())
    return _Measured(merger.result(), steps, trace, size)


def _note(rows: dict[str, Any], found: _Measured) -> None:
    """Append the results of one order to a method's rows."""
    result, count = found.result, len(found.result.tasks)
    rows["acc"].append(result.acc)
    rows["acc_unknown"].append(result.acc_unknown)
    rows["bwt"].append(result.bwt)
    for key, matrix in (("matrix", result.matrix), ("unknown", result.unknown)):
        rows[key].append([row + [None] * (count - len(row)) for row in matrix])
    rows["answers"].append({name: each.noted() for name, each in result.answers.items()})
    rows["order"].append(result.tasks)
    rows["seconds"].append(round(sum(step.merge for step in found.steps), 3))


def _write(path: Path, value: dict[str, Any]) -> None:
    write_json(path, without_nan(value), sort_keys=False)  # methods stay in the order asked for
