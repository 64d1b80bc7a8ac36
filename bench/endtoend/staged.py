"""Large models on small machines: a few steps at several numbers of tasks, what a task does once, and the sum
they make.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mingle.bench import machine
from mingle.bench.endtoend import agreement, contenders
from mingle.bench.endtoend.cases import Problem, Tuned
from mingle.bench.endtoend.clock import STAGES, PeakMemory, Stopwatch, available
from mingle.bench.endtoend.contenders import BF16, LEFT_OUT, NOTES, OURS, PUBLISHED, Contender, Experts, Gates
from mingle.bench.endtoend.whole import refuse
from mingle.nn.inject import find_targets
from mingle.nn.linear import MingleLinear

_log = logging.getLogger("mingle.bench")

MODE = "staged"
METHOD = (
    "Not measured as a whole.  Measured: at each of `at`, behind random experts of so many tasks less one, the adaptation of one task with "
    "`steps_measured` steps; at the last of them also load, project, decompose, subspace and evaluate, once.  Summed: the adaptation of a "
    "task is what it does once (teacher, first step) plus `steps` - 1 times the median step, linear in the number of tasks between the "
    "measured ones; any other stage counts as often as there are tasks (project once less) as measured for the last one.  With `layers`, "
    "project and decompose were measured on one layer of each shape, times their count.  With bf16 products only the adaptation was "
    "measured: the other stages are those of fp32"
)


def measure(
    problem: Problem,
    names: Sequence[str],
    device: torch.device,
    steps: int,
    at_tasks: Sequence[int],
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """By contender the stages of the whole merge as the sum that `METHOD` says, and what was measured for it."""
    found: dict[str, dict[str, Any]] = {
        name: {"note": NOTES[name], "status": "ok", "at": {}, "agreement": {}} for name in names
    }
    if PUBLISHED in found and (needed := published_bytes(problem)) > (free := available(device)):
        reason = f"would take some {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are there"
        found[PUBLISHED] |= {"status": LEFT_OUT, "reason": reason}
        _log.warning("%s: %s %s", problem.case.name, PUBLISHED, reason)
    wanted = problem.options["steps"]
    for count in at_tasks:
        past, last = history(problem, count - 1, seed), count == at_tasks[-1]
        ours: Task | None = None
        for name in names:
            if found[name]["status"] == "ok":
                task = Task(problem, name, device, past, steps, last and name != BF16, ours)
                found[name]["at"][str(count)] = task.figures(wanted)
                for what, verdict in task.compared(ours or task).items():
                    found[name]["agreement"][f"{what} after {count} tasks"] = verdict
                refuse(name, found[name], problem)
                ours = ours or task
    for name, result in found.items():
        if result["status"] == "ok":
            if name == BF16:
                result["at"][str(count)]["seconds"] = (
                    found[OURS]["at"][str(count)]["seconds"] | result["at"][str(count)]["seconds"]
                )
            result |= total(result["at"], problem.tasks, wanted)
    return found


def published_bytes(problem: Problem) -> float:
    """What the published procedure takes at its last task: beside five models, 2.3 times its dense experts,
    as measured at ViT-B/32.
    """
    model = problem.module()
    dense = sum(layer.weight.nbytes for layer in _layers(problem, model).values())
    return 2.3 * problem.tasks * dense + 5 * sum(weight.nbytes for weight in model.parameters())


def _layers(problem: Problem, model: nn.Module) -> Mapping[str, nn.Linear | MingleLinear]:
    """The target layers of the problem's model."""
    return find_targets(model.get_submodule(problem.task.tower), problem.task.layer_sets["full"])


def history(problem: Problem, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """What `count` earlier tasks might have left in the layers: random experts as large as real ones, gates
    and bases.
    """
    generator = torch.Generator().manual_seed(seed)
    rank, k = problem.options.get("rank", 64), problem.options.get("k", 3)
    widths = {
        name: (layer.weight.shape, layer.weight.norm())
        for name, layer in _layers(problem, problem.module()).items()
    }
    tasks: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, ((outputs, inputs), size) in widths.items():
        columns = min(count * k, inputs)
        basis = torch.linalg.qr(torch.randn(inputs, columns, generator=generator)).Q
        for i, tensors in enumerate(tasks):
            tensors[f"{name}.A"] = torch.randn(rank, inputs, generator=generator) * (
                0.02 * size / (inputs * rank) ** 0.5
            )
            tensors[f"{name}.B"] = torch.linalg.qr(torch.randn(outputs, rank, generator=generator)).Q
            tensors[f"{name}.gate_weight"] = 0.01 * torch.randn(inputs, generator=generator)
            tensors[f"{name}.gate_bias"] = torch.zeros(())
            tensors[f"{name}.basis"] = basis[:, i * k : (i + 1) * k]
    return tasks


class Task:
    """One task of one contender, measured behind `past`.

    With `ours`, the experts are those that ours has made, and only one layer of each shape is decomposed,
    after the `last` task alone.
    """

    def __init__(
        self,
        problem: Problem,
        name: str,
        device: torch.device,
        past: contenders.History,
        steps: int,
        last: bool,
        ours: Task | None,
    ) -> None:
        index = len(past)
        expert, seeds, tests = problem.expert(index), problem.seeds(index), problem.tests(index)
        memory, load, clock = PeakMemory(device), machine.Load(), Stopwatch(device)
        contender = contenders.start(name, problem, clock, steps=steps)
        contender.restore(past)
        once = _decomposed(contender, clock, expert) if ours and last else None
        clock.seconds = dict.fromkeys(STAGES, 0.0)
        self.steps = contender.add(expert, seeds, given=ours.experts if ours else None, protect=last)
        if last:
            contender.accuracy([tests])
        self.seconds, self.peak, self.others = dict(clock.seconds), memory.grown(), load.others()
        self.made, self.layers = None, None
        if once is not None:
            self.made, self.layers, seconds = once
            self.seconds |= seconds
        self.last = last
        self.experts: Experts = contender.last_experts() if isinstance(contender, contenders.Ours) else {}
        self.gates: Gates = contender.gates()
        self.bases = {layer: basis.double().cpu() for layer, basis in contender.bases().items()}
        told = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in self.seconds.items() if taken)
        _log.info("%s: %s, task %d: %s", problem.case.name, name, index + 1, told)

    def figures(self, steps: int) -> dict[str, Any]:
        """What was measured, and what `steps` steps would take."""
        step, once = statistics.median(self.steps), self.seconds["adapt"] - sum(self.steps)
        return {
            "seconds": {
                stage: taken
                for stage, taken in self.seconds.items()
                if self.last or stage in ("load", "adapt")
            },
            "layers": self.layers,
            "steps_measured": len(self.steps) + 1,
            "step_seconds": step,
            "step_spread": [min(self.steps), max(self.steps)],
            "adapt_once_seconds": once,
            "adapt_seconds": once + (steps - 1) * step,
            "peak_bytes": self.peak,
            "cpus_used_by_others": self.others,
        }

    def compared(self, ours: Task) -> dict[str, Any]:
        verdicts = {"gates": agreement.gates(self.gates, ours.gates)}
        if self.last:
            verdicts["bases"] = agreement.bases(self.bases, ours.bases)
        if self.made is not None:
            verdicts["experts"] = agreement.experts(self.made, ours.experts)
        return verdicts


def _decomposed(
    contender: Contender, clock: Stopwatch, expert: Tuned
) -> tuple[Experts, dict[str, str], dict[str, float]]:
    """The experts of one layer of each shape, which these are, and the seconds of project and decompose times
    the layers of each shape.
    """
    made: Experts = {}
    layers, seconds = {}, dict.fromkeys(("project", "decompose"), 0.0)
    for shape, names in contender.shapes().items():
        before = dict(clock.seconds)
        made |= contender.make_experts(expert, names[:1])
        for stage in seconds:
            seconds[stage] += len(names) * (clock.seconds[stage] - before[stage])
        layers[shape] = f"1 of {len(names)}"
    return made, layers, seconds


def total(at: Mapping[str, Mapping[str, Any]], tasks: int, steps: int) -> dict[str, Any]:
    """The stages of the whole merge, as `METHOD` adds them up."""
    counts, measured = [int(count) for count in at], list(at.values())
    numbers = np.arange(1, tasks + 1)
    adapt = np.interp(numbers, counts, [one["adapt_seconds"] for one in measured])
    last = measured[-1]["seconds"]
    stages = {stage: tasks * last[stage] for stage in STAGES} | {
        "adapt": float(adapt.sum()),
        "project": (tasks - 1) * last["project"],
    }
    step = np.interp(numbers, counts, [one["step_seconds"] for one in measured])
    layers = "once" if measured[-1]["layers"] is None else "one layer of each shape"
    return {
        "stages": stages,
        "measured": dict.fromkeys(STAGES, "once") | {"adapt": f"{measured[-1]['steps_measured']} of {steps} steps",
                                                    "project": layers, "decompose": layers},
        "rest_seconds": 0.0,
        "whole_seconds": sum(stages.values()),
        "step_seconds": [float(value) for value in step],
        "peak_bytes": measured[-1]["peak_bytes"],
        "cpus_used_by_others": max(one["cpus_used_by_others"] or 0.0 for one in measured),
    }  # fmt: skip
