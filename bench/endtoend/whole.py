"""Whole merges: first a short one to compare gates, then the real one in rounds."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mingle.bench import machine
from mingle.bench.endtoend import agreement, contenders
from mingle.bench.endtoend.cases import Problem
from mingle.bench.endtoend.clock import STAGES, PeakMemory, Stopwatch
from mingle.bench.endtoend.contenders import EXACT, NOTES, OURS

_log = logging.getLogger("mingle.bench")

MODE = "whole"
METHOD = "Every stage of every task was run and timed.  Seconds are medians over rounds, in which the contenders take turns."
#: of the merge whose gates are compared: long runs drift apart by rounding, as Adam divides by small
#: gradients
_CHECK_TASKS, _CHECK_STEPS = 3, 6
#: seconds that timing may take: no round is begun that would not fit
_LONGEST = 200.0


def measure(
    problem: Problem, names: Sequence[str], device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """By contender the seconds of every stage of the whole merge, of a step, peak memory and accuracy."""
    found: dict[str, dict[str, Any]] = {name: {"note": NOTES[name], "status": "ok"} for name in names}
    _check(problem, found, device)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names if found[name]["status"] == "ok"}
    began = time.monotonic()
    for number in range(rounds):
        passed = time.monotonic() - began
        if number and passed * (number + 1) / number > _LONGEST:
            break
        order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in order:
            runs[name].append(run(problem, name, device))
            _log.info("%s: %s: %.1f s", problem.case.name, name, runs[name][-1]["wall_seconds"])
    for name, series in runs.items():
        found[name] |= summary(series)
    return found


def _check(problem: Problem, found: dict[str, dict[str, Any]], device: torch.device) -> None:
    """Status and agreement of every contender, by a short merge each."""
    ours: contenders.Gates = {}
    for name, result in found.items():
        contender = contenders.start(name, problem, Stopwatch(device), steps=_CHECK_STEPS)
        for i in range(min(_CHECK_TASKS, problem.tasks)):
            contender.add(problem.expert(i), problem.seeds(i))
        if name == OURS:
            ours = contender.gates()
        result["agreement"] = {"gates": agreement.gates(contender.gates(), ours)}
        refuse(name, result, problem)


def refuse(name: str, result: dict[str, Any], problem: Problem) -> None:
    """Take a contender's status away where it does not agree."""
    wrong = {what: verdict for what, verdict in result["agreement"].items() if not verdict["ok"]}
    if wrong and name in EXACT:
        result["status"] = "wrong"
        reasons = [
            f"{what} of {one['layer']} are off by {one['error']}, allowed {one['tolerance']}"
            for what, one in wrong.items()
        ]
        result["reason"] = "; ".join(reasons)
        _log.warning("%s: %s is WRONG: %s", problem.case.name, name, result["reason"])


def run(problem: Problem, name: str, device: torch.device) -> dict[str, Any]:
    """One merge of all tasks, and the accuracy after the last."""
    memory, load, clock = PeakMemory(device), machine.Load(), Stopwatch(device)
    began = time.perf_counter()
    contender = contenders.start(name, problem, clock)
    steps, waiting = [], 0.0
    for i in range(problem.tasks):
        made = time.perf_counter()
        expert, seeds = problem.expert(i), problem.seeds(i)
        waiting += time.perf_counter() - made
        steps.append(contender.add(expert, seeds))
    made = time.perf_counter()
    tests = [problem.tests(i) for i in range(problem.tasks)]
    waiting += time.perf_counter() - made
    accuracy = contender.accuracy(tests)
    return {
        "wall_seconds": time.perf_counter() - began - waiting,
        "stages": dict(clock.seconds),
        "step_seconds": [statistics.median(series) if series else None for series in steps],
        "peak_bytes": memory.grown(),
        "accuracy": accuracy,
        "cpus_used_by_others": load.others(),
    }


def summary(series: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, with every round's whole time beside them."""
    stages = {stage: statistics.median(run["stages"][stage] for run in series) for stage in STAGES}
    return {
        "stages": stages,
        "measured": dict.fromkeys(STAGES, "whole"),
        "rest_seconds": statistics.median(
            run["wall_seconds"] - sum(run["stages"].values()) for run in series
        ),
        "whole_seconds": statistics.median(run["wall_seconds"] for run in series),
        "rounds": [dict(run) for run in series],
        "step_seconds": [
            statistics.median(steps) for steps in zip(*(run["step_seconds"] for run in series), strict=True)
        ],
        "peak_bytes": max(
            (run["peak_bytes"] for run in series if run["peak_bytes"] is not None), default=None
        ),
        "accuracy": statistics.median(run["accuracy"] for run in series),
        "cpus_used_by_others": statistics.median(run["cpus_used_by_others"] or 0.0 for run in series),
    }
