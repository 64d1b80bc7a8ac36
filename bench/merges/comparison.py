"""Merges measured: as a whole, in rounds; or, of large models on small machines, in parts that are summed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mingle.bench.machine import STAGES, LoadMeter, PeakMemory, Stopwatch, available
from mingle.bench.measure import OURS, Rounds, Row, interleaved, log, relative, summary
from mingle.bench.merges import agreement, contenders
from mingle.bench.merges.agreement import Experts
from mingle.bench.merges.cases import BF16, PUBLISHED, MergeProblem, Tuned
from mingle.bench.merges.contenders import EXACT, NOTES, Contender
from mingle.nn.inject import find_targets
from mingle.nn.low_rank_expert import LowRankExpert

WHOLE = "Every stage of every task was run and timed.  Seconds are medians over rounds, taken in turns."
STAGED = """Not measured as a whole.  Measured: at each of `at`, behind random experts of that many tasks \
less one, the adaptation of one task with `steps_measured` steps; at the last of them also load, project, \
decompose, subspace and evaluate, once.  Summed: the adaptation of a task is what it does once (teacher, \
first step) plus `steps` - 1 times the median step, linear in the number of tasks between the measured \
ones; any other stage counts as often as there are tasks (project once less) as measured for the last \
one.  With `layers`, project and decompose were measured on one layer of each shape, times their count.  \
With bf16 products only the adaptation was measured: the other stages are those of fp32"""
#: of the merge whose gates are compared: long runs drift apart, as Adam divides by small gradients
_CHECK_TASKS, _CHECK_STEPS = 3, 6
#: seconds that timing whole merges may take: no round is begun that would not fit
_LONGEST = 200.0


def whole(
    problem: MergeProblem, names: Sequence[str], device: torch.device, rounds: int, seed: int = 0
) -> list[Row]:
    """Seconds of the whole merge, its stages and steps, peak memory and accuracy of each contender."""
    rows = _rows(names)
    _check(problem, rows, device)
    runs: dict[str, list[Row]] = {row["name"]: [] for row in _right(rows)}
    steps = {name: partial(lambda name: runs[name].append(run(problem, name, device)), name) for name in runs}
    interleaved(steps, device, Rounds(_LONGEST, fewest=1, most=rounds, warm_ups=0, collect=True), seed)
    for row in _right(rows):
        row |= of_runs(runs[row["name"]])
    return rows


def _rows(names: Sequence[str]) -> list[Row]:
    return [{"name": name, "status": "ok", "note": NOTES[name]} for name in names]


def _right(rows: Sequence[Row]) -> Iterator[Row]:
    return (row for row in rows if row["status"] == "ok")


def _check(problem: MergeProblem, rows: Sequence[Row], device: torch.device) -> None:
    """Status and agreement of every contender, by a short merge each, of which nothing is left."""
    ours: agreement.Gates = {}
    for row in rows:
        contender = contenders.start(row["name"], problem, Stopwatch(device), steps=_CHECK_STEPS)
        for i in range(min(_CHECK_TASKS, problem.tasks)):
            contender.add(problem.expert(i), problem.seeds(i))
        ours = ours or contender.gates()  # the first one's
        _agree(row, {"gates": agreement.gates(contender.gates(), ours)})


def _agree(row: Row, verdicts: Mapping[str, Any]) -> None:
    """Note how far a contender is from ours, and take its status away where it should agree and does not."""
    agreed = row.setdefault("agreement", {})
    agreed |= verdicts
    row["errors"] = {what: one["error"] for what, one in agreed.items()}
    wrong = {f"{what} of {one['layer']}": one for what, one in agreed.items() if not one["ok"]}
    if wrong and row["name"] in EXACT:
        told = (f"{k} are off by {one['error']}, allowed {one['tolerance']}" for k, one in wrong.items())
        row |= {"status": "wrong", "reason": "; ".join(told)}
        log.warning("%s is WRONG: %s", row["name"], row["reason"])


def run(problem: MergeProblem, name: str, device: torch.device) -> Row:
    """One merge of all tasks, and the accuracy after the last; making experts and samples is not counted."""
    memory, load, clock = PeakMemory(device), LoadMeter(), Stopwatch(device)
    clock.seconds["inputs"] = 0.0
    began = time.perf_counter()
    contender, steps = contenders.start(name, problem, clock), []
    for i in range(problem.tasks):
        with clock("inputs"):
            task = problem.expert(i), problem.seeds(i)
        steps.append(contender.add(*task))
    with clock("inputs"):
        tests = [problem.tests(i) for i in range(problem.tasks)]
    accuracy = contenders.mean_accuracy(contender, tests)
    wall = time.perf_counter() - began - clock.seconds.pop("inputs")
    log.info("%s: %s: %.1f s", problem.case.name, name, wall)
    medians = [statistics.median(series) if series else None for series in steps]
    found = dict(wall_seconds=wall, stages=clock.seconds, accuracy=accuracy, step_seconds=medians)
    return found | dict(peak_bytes=memory.grown(), cpus_used_by_others=load.others())


def of_runs(runs: Sequence[Row]) -> Row:
    """Medians over rounds, with every round beside them."""
    wholes, stages = [run["wall_seconds"] for run in runs], [run["stages"] for run in runs]
    rest = [wall - sum(seconds.values()) for wall, seconds in zip(wholes, stages, strict=True)]
    steps = zip(*(run["step_seconds"] for run in runs), strict=True)
    return _times(stages, wholes) | {
        "measured": dict.fromkeys(STAGES, "whole"),
        "rest_seconds": statistics.median(rest),
        "rounds": list(runs),
        "step_seconds": [statistics.median(series) for series in steps],
        "peak_bytes": max((run["peak_bytes"] for run in runs if run["peak_bytes"] is not None), default=None),
        "accuracy": statistics.median(run["accuracy"] for run in runs),
        "cpus_used_by_others": statistics.median(run["cpus_used_by_others"] or 0.0 for run in runs),
    }


def _times(stages: Sequence[Mapping[str, float]], wholes: Sequence[float]) -> Row:
    """Of the whole merge and of every stage."""
    return summary(wholes) | {"stages": {name: summary([one[name] for one in stages]) for name in STAGES}}


def relate(rows: Sequence[Row]) -> None:
    """Add times relative to ours, of the whole merge and of every stage."""
    timed = {row["name"]: [row, *row["stages"].values()] for row in rows if "stages" in row}
    for parts in timed.values() if OURS in timed else ():
        for part, own in zip(parts, timed[OURS], strict=True):
            part |= relative(part["seconds"], own["seconds"]) if all(own["seconds"]) else {}


def staged(
    problem: MergeProblem, names: Sequence[str], device: torch.device, steps: int, at: Sequence[int],
    seed: int = 0,
) -> list[Row]:  # fmt: skip
    """The stages of the whole merge as the sum that `STAGED` says, and what was measured for it."""
    rows = [row | {"at": {}, "agreement": {}} for row in _rows(names)]
    needed, free = published_bytes(problem), available(device)
    for row in rows if needed > free else ():
        if row["name"] == PUBLISHED:
            reason = f"would take some {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are there"
            row |= {"status": "left out", "reason": reason}
    for count in at:
        past, ours = history(problem, count - 1, seed), None
        for row in _right(rows):
            every = count == at[-1] and row["name"] != BF16
            row["at"][str(count)], contender, made = _staged_task(
                problem, row["name"], device, past, steps, every, ours
            )
            ours = ours or contender
            verdicts = {"gates": agreement.gates(contender.gates(), ours.gates())}
            if every:
                verdicts["bases"] = agreement.bases(contender.bases(), ours.bases())
            if made:
                verdicts["experts"] = agreement.experts(made, _newest(ours))
            _agree(row, {f"{what} after {count} tasks": verdict for what, verdict in verdicts.items()})
    for row in _right(rows):
        own, fp32 = row["at"][str(at[-1])], rows[0]["at"][str(at[-1])]
        own["seconds"] = fp32["seconds"] | own["seconds"]  # with bf16 products some stages are not measured
        row |= total(row["at"], problem.tasks, problem.options["steps"])
    return rows


def _staged_task(
    problem: MergeProblem, name: str, device: torch.device, past: contenders.History, steps: int, every: bool,
    ours: Contender | None,
) -> tuple[Row, Contender, Experts]:  # fmt: skip
    """One task of one contender behind `past`, with the experts that ours made; for `every` stage one layer
    of each shape is also decomposed, and all that follows adaptation is run.
    """
    index = len(past)
    expert, seeds, tests = problem.expert(index), problem.seeds(index), problem.tests(index)
    memory, load, clock = PeakMemory(device), LoadMeter(), Stopwatch(device)
    contender = contenders.start(name, problem, clock, past, steps=steps)
    made, layers, decomposing = _decomposed(contender, expert) if ours and every else ({}, None, {})
    clock.seconds = dict.fromkeys(STAGES, 0.0)
    taken = contender.add(expert, seeds, _newest(ours) if ours else None, protect=every)
    if every:
        contenders.mean_accuracy(contender, [tests])
    measured = STAGES if every else ("load", "adapt")
    seconds = {stage: clock.seconds[stage] for stage in measured} | decomposing
    log.info("%s: %s, task %d: adapted in %.1f s", problem.case.name, name, index + 1, seconds["adapt"])
    once, step = seconds["adapt"] - sum(taken), statistics.median(taken)
    found: Row = dict(seconds=seconds, layers=layers, steps=taken, steps_measured=len(taken) + 1)
    found |= dict(peak_bytes=memory.grown(), cpus_used_by_others=load.others())
    adapt = once + (problem.options["steps"] - 1) * step
    return found | dict(step_seconds=step, adapt_once_seconds=once, adapt_seconds=adapt), contender, made


def _decomposed(contender: Contender, expert: Tuned) -> tuple[Experts, dict[str, str], dict[str, float]]:
    """The experts of one layer of each shape, these, and the seconds of project and decompose for all."""
    shapes: dict[str, list[str]] = {}
    for name, layer in contender.layers.items():
        shapes.setdefault("×".join(map(str, layer.weight.shape)), []).append(name)
    made: dict[str, LowRankExpert] = {}
    seconds = {"project": 0.0, "decompose": 0.0}
    for names in shapes.values():
        before = dict(contender.clock.seconds)
        made |= contender.make_experts(expert, names[:1])
        for stage in seconds:
            seconds[stage] += len(names) * (contender.clock.seconds[stage] - before[stage])
    return made, {shape: f"1 of {len(names)}" for shape, names in shapes.items()}, seconds


def _newest(ours: Contender) -> Experts:
    layers: Mapping[str, Any] = ours.layers
    return {name: layer.experts()[-1] for name, layer in layers.items()}


def total(at: Mapping[str, Mapping[str, Any]], tasks: int, steps: int) -> Row:
    """The stages of the whole merge, as `STAGED` adds them up."""
    *_, last = at.values()
    seconds = last["seconds"]

    def of_each_task(key: str) -> list[float]:
        known = list(map(int, at)), [one[key] for one in at.values()]
        return [float(value) for value in np.interp(range(1, tasks + 1), *known)]

    stages = {stage: tasks * seconds[stage] for stage in STAGES}
    stages |= {"adapt": sum(of_each_task("adapt_seconds")), "project": (tasks - 1) * seconds["project"]}
    layers = "once" if last["layers"] is None else "one layer of each shape"
    measured = {"adapt": f"{last['steps_measured']} of {steps} steps", "project": layers, "decompose": layers}
    return _times([stages], [sum(stages.values())]) | {
        "measured": dict.fromkeys(STAGES, "once") | measured,
        "step_seconds": of_each_task("step_seconds"),
        "peak_bytes": last["peak_bytes"],
        "cpus_used_by_others": max(one["cpus_used_by_others"] or 0.0 for one in at.values()),
    }


def published_bytes(problem: MergeProblem) -> float:
    """Of the published procedure's last task: five models, and 2.3 times its dense experts (ViT-B/32)."""
    model = problem.module()
    dense = sum(layer.weight.nbytes for layer in _targets(problem.task, model).values())
    return 2.3 * problem.tasks * dense + 5 * sum(weight.nbytes for weight in model.parameters())


def history(problem: MergeProblem, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """What `count` earlier tasks might have left: random experts as large as real ones, gates and bases."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    rank, k = problem.options.get("rank", 64), problem.options.get("k", 3)
    tasks: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, layer in _targets(problem.task, problem.module()).items():
        (outputs, inputs), size = layer.weight.shape, layer.weight.detach().norm()
        basis = torch.linalg.qr(randn(inputs, min(count * k, inputs))).Q
        for i, tensors in enumerate(tasks):
            A = randn(rank, inputs) * (0.02 * size / (inputs * rank) ** 0.5)
            B, own = torch.linalg.qr(randn(outputs, rank)).Q, basis[:, i * k : (i + 1) * k]
            gate = dict(gate_weight=0.01 * randn(inputs), gate_bias=torch.zeros(()))
            left = {"A": A, "B": B, **gate, "basis": own}
            tensors |= {f"{name}.{key}": tensor for key, tensor in left.items()}
    return tasks


def _targets(task: Any, model: nn.Module) -> dict[str, Any]:
    return find_targets(model.get_submodule(task.tower(model)), task.structure(model).sets["full"])
