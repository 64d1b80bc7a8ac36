"""How the cost of one adaptation step grows with tasks, layers and width, and what is kept after many tasks."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mingle.bench import machine, measure
from mingle.bench.endtoend import cases, contenders, staged
from mingle.bench.endtoend.cases import Case, Problem
from mingle.bench.endtoend.clock import Stopwatch
from mingle.bench.endtoend.contenders import OURS, PUBLISHED
from mingle.methods.mingle import Mingle
from mingle.nn.linear import LowRankExpert
from mingle.tasks import TaskData, get

_log = logging.getLogger("mingle.bench")

#: what stays while one of them grows
WIDTH, LAYERS, TASKS = 128, 2, 8
RANK, BATCH, SEEDS = 16, 16, 32
#: what one more task may leave beside its experts, gates and directions, as a share of these
ALLOWED = 0.01
_OF_A_LAYER = ("A", "B_transposed", "gate_weight", "gate_bias", "frozen_gate_weight", "frozen_gate_bias")


@dataclass(frozen=True)
class Sweep:
    label: str
    values: tuple[int, ...]


SWEEPS = {
    "tasks": Sweep("the number of tasks", (1, 2, 4, 8, 16, 32, 64)),
    "layers": Sweep("the number of blocks, six target layers each", (1, 2, 4, 8, 16)),
    "width": Sweep("the width", (64, 128, 256, 512)),
}
QUICK = {"tasks": Sweep("the number of tasks", (1, 2, 4)), "width": Sweep("the width", (32, 64))}
_METHOD = (
    "seconds of one adaptation step behind random experts of all tasks but the newest, medians; memory: the most that PyTorch's allocator "
    "hands out in one adaptation of one step beyond what was held before, on a CPU; exponents: slopes of log over log by least squares"
)


def run(
    device: torch.device, reduce: str, sweeps: Mapping[str, Sweep], tasks: int, steps: int, seed: int = 0
) -> dict[str, Any]:
    """All curves, and what `tasks` merges leave behind, as plain data."""
    load = machine.Load()
    found: dict[str, Any] = {}
    for name, sweep in sweeps.items():
        curves: dict[str, dict[str, list[float]]] = {}
        for value in sweep.values:
            sizes = {"tasks": TASKS, "layers": LAYERS, "width": WIDTH} | {name: value}
            for contender in (OURS, PUBLISHED):
                seconds, peak = _step(contender, sizes, device, reduce, steps, seed)
                curve = curves.setdefault(contender, {"seconds": [], "peak_bytes": []})
                curve["seconds"].append(seconds)
                curve["peak_bytes"].append(peak)
            _log.info(
                "growth with %s = %d: %s",
                name,
                value,
                {c: f"{curve['seconds'][-1] * 1e3:.1f} ms" for c, curve in curves.items()},
            )
        for curve in curves.values():
            curve["exponents"] = {
                key: exponents(sweep.values, curve[key]) for key in ("seconds", "peak_bytes")
            }  # type: ignore[assignment]
        found[name] = {"label": sweep.label, "values": list(sweep.values), "curves": curves}
    return {
        "method": _METHOD,
        "sizes": {
            "width": WIDTH,
            "blocks": LAYERS,
            "tasks": TASKS,
            "rank": RANK,
            "batch": BATCH,
            "tokens": 50,
        },
        "sweeps": found,
        "kept": kept(device, tasks, reduce, seed),
        "cpus_used_by_others": load.others(),
    }


def exponents(values: Sequence[float], costs: Sequence[float]) -> dict[str, float]:
    """p of cost ∝ valueᵖ, fitted to all points and to the upper half of them, at least two."""
    half = max(2, (len(values) + 1) // 2)
    return {name: _slope(values[-n:], costs[-n:]) for name, n in (("all", len(values)), ("upper", half))}


def _slope(values: Sequence[float], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def small_problem(sizes: Mapping[str, int], reduce: str, steps: int, seed: int) -> Problem:
    """A small tower of the sizes `tasks`, `layers` and `width`; its experts are state dicts, not files."""
    width = sizes["width"]
    vision = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=sizes["layers"])
    vision |= dict(num_attention_heads=max(1, width // 64), patch_size=4, image_size=28)
    base = cases.random_clip(vision, 64, seed)
    options = dict(rank=RANK, batch_size=BATCH, reduce=reduce, steps=steps)

    def data(i: int) -> TaskData:
        return cases.images(vision, 64, 10, SEEDS, seed + 1000 * i)

    case = Case("growth", f"{sizes['layers']} blocks of width {width}", tuple(vision.items()), 64)
    return Problem(
        case,
        get("clip"),
        base,
        sizes["tasks"],
        options,
        lambda i: cases.tuned_tower(base, i, seed),
        data,
        data,
    )


def _step(
    contender: str, sizes: Mapping[str, int], device: torch.device, reduce: str, steps: int, seed: int
) -> tuple[float, int]:
    """Median seconds of a step, and the most bytes that one adaptation holds."""
    problem = small_problem(sizes, reduce, steps, seed)
    *past, new = staged.history(problem, sizes["tasks"], seed)
    given = {
        name.removesuffix(".A"): LowRankExpert(A, new[f"{name[:-2]}.B"])
        for name, A in new.items()
        if name.endswith(".A")
    }
    expert, seeds = problem.expert(len(past)), problem.seeds(len(past))
    running, once = (contenders.start(contender, problem, Stopwatch(device), steps=n) for n in (steps, 2))
    running.restore(past)
    seconds = statistics.median(running.add(expert, seeds, given))
    once.restore(past)
    peak = measure.peak_bytes(lambda: {"": torch.tensor(once.add(expert, seeds, given))}, device)
    return seconds, peak or 0


def kept(device: torch.device, tasks: int, reduce: str, seed: int = 0) -> dict[str, Any]:
    """Bytes in living tensors after each of so many merges of ours, and how many of them are experts, gates
    and bases.
    """
    problem = small_problem({"tasks": tasks, "layers": LAYERS, "width": 64}, reduce, 2, seed)
    expert, seeds = (
        problem.expert(0),
        problem.seeds(0),
    )  # the same for all: what they are does not matter here
    running = contenders.start(OURS, problem, Stopwatch(device))
    assert isinstance(running, contenders.Ours)
    before = _held(device)
    held, accounted = [], []
    for _ in range(tasks):
        running.add(expert, seeds)
        held.append(_held(device) - before)
        accounted.append(_accounted(running.method))
    rest = [h - a for h, a in zip(held, accounted, strict=True)]
    slope = float(np.polyfit(range(1, tasks + 1), rest, 1)[0]) if tasks > 1 else 0.0
    return {
        "tasks": list(range(1, tasks + 1)),
        "held_bytes": held,
        "accounted_bytes": accounted,
        "unaccounted_bytes_per_task": slope,
        "ok": abs(slope) <= ALLOWED * accounted[-1] / tasks,
    }


def _accounted(method: Mingle) -> int:
    """Bytes of a merge's experts, gates and bases."""
    tensors = [getattr(layer, name) for layer in method.layers.values() for name in _OF_A_LAYER]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *method.bases.values()))


def _held(device: torch.device) -> int:
    """Bytes of all storages that living dense tensors share; a merge makes no others."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        plain = type(thing) in (torch.Tensor, torch.nn.Parameter)
        if plain and thing.device.type == device.type and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
