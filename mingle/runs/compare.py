"""Whole runs: every method on the same sequence of tasks, evaluated after each merge, with all results in one
folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from mingle import methods, suites
from mingle.runs import report
from mingle.adaptation.train import AdaptTrace, StepProgress
from mingle.runs.config import shuffled
from mingle.merging.evaluate import Result, gate_activation
from mingle.io.files import without_nan, write_json
from mingle.io.hub import Revisions
from mingle.merging.merger import Merger
from mingle.methods.mingle import Mingle
from mingle.options import build
from mingle.io.provenance import versions
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS

#: The first of the ten published order seeds.
FIRST_ORDER_SEED = 42


@dataclass(frozen=True)
class Experiment:
    """A comparison of methods.

    Attributes:
        suite: see `mingle.suites.load`.
        protocol: ``strict`` or ``official``.
        methods: names in `mingle.methods.METHODS`.
        orders: how many task orders, by the seeds 42, 43, …
        samples_per_class: seed samples, times the number of classes.
        seed: of seed samples, gates and batches.
        options: method options that replace the suite's own settings; each method takes those it knows.
    """

    suite: str = "glyphs8"
    protocol: str = "strict"
    methods: tuple[str, ...] = ("pre-trained", "individual", "average", "task-arithmetic", "opcm", "mingle", "mingle-light", "routed")
    orders: int = 1
    samples_per_class: int = 5
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def options_for(self, method: str, suite: Suite) -> dict[str, Any]:
        """The settings of this experiment that the method knows."""
        return options_for(method, suite, dict(self.options))


def options_for(method: str, suite: Suite, options: Mapping[str, Any]) -> dict[str, Any]:
    """The published settings, over them the suite's own, its protocol's gates and then `options`, as far as
    the method knows them.
    """
    known = {f.name for f in fields(methods.get(method).Options)}
    settings = methods.published(method, suite.task_type, len(suite)) | suite.settings.get(method, {})
    settings |= {"reduce": PROTOCOLS[suite.request.protocol]} | dict(options)
    return {name: value for name, value in settings.items() if name in known}


class Observer:
    """Told how a run gets on; does nothing by itself."""

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        """Task `index` of the order is about to be merged."""

    def adapting(self, progress: StepProgress) -> None:
        """An adaptation step is done."""

    def training(self, task: str, step: int, steps: int) -> None:
        """An expert of the suite is being trained, because it does not ship."""

    def merged(self, method: str, order: int, result: Result) -> None:
        """All tasks are merged and evaluated."""


def run(experiment: Experiment, out: Path, observer: Observer | None = None) -> dict[str, Any]:
    """Run every method and write the folder `out`.

    The folder holds ``config.yaml``, ``results.json``, ``accuracy_matrix.csv``, ``timings.json``,
    ``traces.json``, the plots, and under ``merged/`` every method's merged model of the first order.

    Returns:
        What ``results.json`` holds.
    """
    observer = observer or Observer()
    suite = suites.load(
        experiment.suite,
        protocol=experiment.protocol,
        samples_per_class=experiment.samples_per_class,
        seed=experiment.seed,
        on_training=observer.training,
    )
    for method in experiment.methods:  # every mistake before the first merge
        build(methods.get(method).Options, experiment.options_for(method, suite), f"method {method!r}")
        if methods.get(method).sequential:
            suite.check_sequential()
    out.mkdir(parents=True, exist_ok=True)
    settings = asdict(experiment) | {"methods": list(experiment.methods), "options": dict(experiment.options)}
    (out / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for name in suite:
        suite.check(name)
        suite.expert(name)  # fetch or train what is missing before anything is timed
    results: dict[str, Any] = {
        "suite": experiment.suite,
        "protocol": experiment.protocol,
        "seed": experiment.seed,
        "versions": versions(),
        "methods": {},
    }
    timings: dict[str, Any] = {}
    traces: dict[str, Any] = {}
    for method in experiment.methods:
        rows: dict[str, list[Any]] = {key: [] for key in ("acc", "bwt", "matrix", "order", "seconds")}
        results["methods"][method] = rows
        timings[method] = []
        for number in range(experiment.orders):
            order = shuffled(list(suite), FIRST_ORDER_SEED + number)
            merger = Merger(suite.base, method, suite.task_type, seed=experiment.seed, **experiment.options_for(method, suite))
            merger.metadata = origin(experiment.suite, experiment.protocol, experiment.samples_per_class, revisions=suite.revisions)
            steps = list(merge_all(merger, suite, order, observer, number))
            result = merger.result()
            rows["acc"].append(result.acc)
            rows["bwt"].append(result.bwt)
            rows["matrix"].append([row + [None] * (len(order) - len(row)) for row in result.matrix])
            rows["order"].append(order)
            rows["seconds"].append(round(sum(step.merge for step in steps), 3))
            timings[method].append([{"task": step.task, "merge": step.merge, "evaluate": step.evaluate} for step in steps])
            if number == 0:
                if trace := trace_of(merger, suite, steps):
                    traces[method] = trace
                if method not in report.REFERENCES:
                    merger.save_pretrained(out / "merged" / method)
            observer.merged(method, number, result)
        _write(out / "results.json", results)
        _write(out / "timings.json", timings)
    _write(out / "traces.json", traces)
    report.write_csv(results, out / "accuracy_matrix.csv")
    report.write_plots(results, traces, out)
    return results


def origin(
    suite: str | None = None,
    protocol: str = "strict",
    samples_per_class: int = 5,
    batch_size: int = 128,
    revisions: Revisions | None = None,
) -> dict[str, Any]:
    """Where a merger's samples and models came from, saved as its metadata, so that adding and evaluating
    later goes on alike.
    """
    return {
        "suite": suite,
        "protocol": protocol,
        "samples_per_class": samples_per_class,
        "batch_size": batch_size,
        "revisions": {} if revisions is None else revisions,
    }


@dataclass(frozen=True)
class Step:
    """What merging one task took: seconds of merging and of evaluating, and the course of the adaptation,
    where there was one.
    """

    task: str
    merge: float
    evaluate: float
    trace: AdaptTrace | None


def merge_all(
    merger: Merger, suite: Suite, order: Sequence[str], observer: Observer, number: int, *, evaluate: str = "every"
) -> Iterator[Step]:
    """Merge those tasks of the order that are not merged yet; yields after each, when the merger can be
    saved.

    Args:
        evaluate: ``every`` measures all merged tasks after each merge; ``ends`` the newest one, and all of
            them after the last merge, which is what ACC and BWT need.
    """
    for index in range(len(merger.merged), len(order)):
        name, last = order[index], index + 1 == len(order)
        observer.merging(merger.method.name, number, index, order)
        sequential = merger.method.sequential
        seeds = suite.seeds(name, whole=sequential) if merger.method.needs_seeds else None
        expert = suite.expert(name, order[:index] if sequential else ())
        began = time.perf_counter()
        report = merger.add(name, expert, seeds, on_step=observer.adapting)
        merged = time.perf_counter()
        merger.evaluate(suite, tasks=None if last or evaluate == "every" else [name])
        yield Step(name, round(merged - began, 3), round(time.perf_counter() - merged, 3), report.trace)


def trace_of(merger: Merger, suite: Suite, steps: Sequence[Step]) -> dict[str, Any]:
    """What the adaptations of all steps did (losses, S, λ) and the gates after the last; empty for a method
    that does not adapt so.
    """
    recorded = [step.trace for step in steps if step.trace is not None]
    if not isinstance(merger.method, Mingle) or len(recorded) < len(steps):
        return {}
    layers = merger.method.layers
    with torch.no_grad():
        # along the merged model's own answers
        samples = [merger.task.prepared(lambda: merger.model, suite[step.task]) for step in steps]
        gates = [gate_activation(merger.task, merger.model, layers, data).tolist() for data in samples]
    series = {key: [getattr(trace, key) for trace in recorded] for key in ("loss", "interference", "strength")}
    return {"order": merger.task_names, "layers": list(layers), "gates": gates, **series}


def _write(path: Path, value: dict[str, Any]) -> None:
    write_json(path, without_nan(value), sort_keys=False)  # methods stay in the order that was asked for
