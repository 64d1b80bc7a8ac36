"""What a merge will take of disk, memory and time, estimated from shapes and numbers before it begins."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mingle import methods
from mingle.io.base_files import base_files
from mingle.methods.base import MergeMethod
from mingle.runs import room
from mingle.runs.merge import MergePlan
from mingle.tasks.configs import broken
from mingle.tasks.structure import example_inputs

#: tokens that a text is taken to have, as nobody has read any yet
_TOKENS = 64
#: forward passes run at this share of the speed of one large product
_EFFICIENCY = 0.5
#: a step of adaptation: the teacher's forward pass, and the model's forward and backward
_PASSES_PER_STEP = 4


@dataclass(frozen=True)
class Costs:
    """Estimates, each by the parts that it is made of; of a merge from its beginning.

    Attributes:
        disk: bytes that all merged models take, with all generations that are kept.
        memory: bytes of what is there all the time; what a method computes with comes on top, but for merges
            that go one tensor at a time.
        seconds: of files, and of forward and backward passes; what a method computes with weights comes on
            top.  NaN for passes where the number of samples, or the work for one, is not known.
    """

    disk: dict[str, int]
    memory: dict[str, int]
    seconds: dict[str, float]


def of_plan(plan: MergePlan) -> Costs:
    """The costs of a merge; for a moment something is computed, to see how fast this machine is."""
    size, count, orders = room.of_method(plan.fitted, plan.base), len(plan.experts), len(plan.orders)
    if plan.forecast is not None:
        files = (plan.forecast.read + plan.forecast.written) / _hashed_per_second()
        memory = {"one tensor at a time": plan.forecast.memory}
        return Costs({"merged model": plan.forecast.disk}, memory, {"files": files})
    states = size.state * room.generations(count, plan.config.keep)
    disk = {"base": size.base, "tasks": size.saved_each(count, keep=plan.config.keep) - states}
    disk["states"] = states
    models = sum(size_of(folder) for folder in (plan.base, *plan.experts.values()))
    written = size.base + (size.task + size.state // 2) * count
    # before a model is read, it is hashed
    seconds = {"files": (2 * models + written) * orders / _hashed_per_second()} | _passes(plan)
    return Costs({name: part * orders for name, part in disk.items()}, plan.memory(), seconds)


def size_of(folder: Path) -> int:
    """The bytes of a model's weights."""
    return sum(file.stat().st_size for file in base_files(folder, (".safetensors",)))


def evaluations(plan: MergePlan) -> int | None:
    """How many samples are looked at to measure accuracies; None where the suite does not know."""
    if plan.suite is None:
        return 0
    total = 0
    for order in plan.orders:
        for place, name in enumerate(order):
            size = plan.suite.size(name)
            if size is None:
                return None
            total += size * (len(order) - place if plan.config.eval.every_step else 1)
    return total


def _passes(plan: MergePlan) -> dict[str, float]:
    """Seconds."""
    samples, one = evaluations(plan), _forward(plan.fitted)
    adapted = _steps(plan.config.method, plan.options) * len(plan.experts) * len(plan.orders)
    counts = {"adapting": adapted * _PASSES_PER_STEP, "measuring": math.nan if samples is None else samples}
    if not any(counts.values()):
        return dict.fromkeys(counts, 0.0)
    each = math.nan if one is None else one / (_speed() * _EFFICIENCY)
    return {name: count * each for name, count in counts.items()}


def _steps(method: str, options: Mapping[str, Any]) -> int:
    """How many samples a method adapts on for each task, each time it sees one."""
    if not methods.get(method).needs_seeds:
        return 0
    return int(options.get("steps", 0)) * int(options.get("batch_size", 1))


def _forward(fitted: MergeMethod) -> int | None:
    """The floating-point operations of a forward pass for one sample, counted on the meta device."""
    tower, device = fitted.tower, torch.device("meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            fitted.task.run(tower, 1, device)
        ids = example_inputs(tower, 1, device).get("input_ids")
    except broken():
        return None
    return counter.get_total_flops() * (1 if ids is None else _TOKENS // ids.shape[1])


def _speed() -> float:
    """Floating-point operations per second, in a product of two matrices of 1024 rows."""
    matrix = torch.ones(1024, 1024)
    return 2 * 1024**3 / _shortest(lambda: matrix @ matrix)


def _hashed_per_second() -> float:
    """Bytes per second."""
    data = bytes(1 << 23)
    return len(data) / _shortest(lambda: hashlib.sha256(data))


def _shortest(run: Callable[[], object]) -> float:
    """The seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
