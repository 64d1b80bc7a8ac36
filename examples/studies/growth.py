"""How the cost of an adaptation step grows with tasks, layers and width, and what many tasks leave behind.

``python examples/studies/growth.py --out FOLDER`` takes some minutes on a CPU; ``--quick`` shows whether it
works.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from swept import draw, exponents

from mingle.bench import command
from mingle.bench.machine import LoadMeter, Stopwatch, peak_bytes
from mingle.bench.measure import OURS, Row, log, summary
from mingle.bench.merges import cases, comparison, contenders
from mingle.bench.merges.cases import PUBLISHED, MergeCase, MergeProblem
from mingle.bench.record import CaseResult, Results, case_result, envelope
from mingle.nn.low_rank_expert import LowRankExpert

#: what stays while one of them grows
FIXED = {"tasks": 8, "layers": 2, "width": 128}
RANK, BATCH, SEEDS = 16, 16, 32
#: what one more task may leave beside its experts, gates and directions, as a share of these
ALLOWED = 0.01
_OF_A_LAYER = ("A", "B_transposed", "gate_weight", "gate_bias", "frozen_gate_weight", "frozen_gate_bias")
_BLOCKS = "the number of blocks, six target layers each"
_LABELS = {"tasks": "the number of tasks", "layers": _BLOCKS, "width": "the width"}
SWEEPS = {"tasks": (1, 2, 4, 8, 16, 32, 64), "layers": (1, 2, 4, 8, 16), "width": (64, 128, 256, 512)}
QUICK = {"tasks": (1, 2, 4), "width": (32, 64)}
METHOD = """seconds of one adaptation step behind random experts of all tasks but the newest, medians; \
memory: the most that PyTorch's allocator hands out in one adaptation of one step beyond what was held \
before, on a CPU; exponents: slopes of log over log by least squares"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the curves.  Returns 1 where memory leaked, else 0."""
    parser = command.parser("How the cost of an adaptation step grows with tasks, layers and width.")
    parser.add_argument(
        "--reduce", choices=("batch", "sample", "token"), default="batch", help="what gates see"
    )
    args = command.begin(parser, arguments)
    found = grow(args.device, args.reduce, args.quick, args.seed)
    if args.out:
        draw(found, args.out / "growth.png")
    return command.finish(found, args.out, "growth") or int(not found["kept"]["ok"])


def grow(device: torch.device, reduce: str, quick: bool, seed: int = 0) -> Results:
    """The growth curves, and what many merges leave behind."""
    began, load = time.monotonic(), LoadMeter()
    sweeps, tasks, steps = (QUICK, 4, 3) if quick else (SWEEPS, 64, 6)
    found = [sweep(name, values, device, reduce, steps, seed) for name, values in sweeps.items()]
    left, fixed = kept(device, tasks, reduce, seed), FIXED
    held, known = (left[key][-1] / 1e6 for key in ("held_bytes", "accounted_bytes"))
    remark = (
        f"after {tasks} tasks: {held:.2f} MB in tensors beyond the base, {known:.2f} MB of them experts, "
        f"gates, bases and heads; unaccounted per task: {left['unaccounted_bytes_per_task']:.0f} bytes"
    )
    sizes = fixed | {"rank": RANK, "batch": BATCH, "tokens": 50, "reduce": reduce}
    same = f"width {fixed['width']}, {fixed['layers']} blocks, {fixed['tasks']} tasks where they do not vary"
    title = f"How the cost of an adaptation step grows: {same}; gates of a {reduce}"
    about = {"title": title, "quick": quick, "method": METHOD, "sizes": sizes, "kept": left}
    about |= {"remarks": [remark], "cpus_used_by_others": load.others()}
    return envelope("growth", device, seed, found, (), began, **about)


def sweep(
    name: str, values: Sequence[int], device: torch.device, reduce: str, steps: int, seed: int = 0
) -> CaseResult:
    """One curve of each contender: a row for each value, and what is fitted to them."""
    rows: list[Row] = []
    for value, contender in itertools.product(values, (OURS, PUBLISHED)):
        row = _step(contender, FIXED | {name: value}, device, reduce, steps, seed)
        rows.append({"name": contender, "status": "ok", "at": value} | row)
        log.info("growth with %s = %d: %s: %.1f ms", name, value, contender, row["median"] * 1e3)
    fitted: dict[str, dict[str, dict[str, float]]] = {OURS: {}, PUBLISHED: {}}
    remarks = []
    for contender, (key, cost) in itertools.product(fitted, (("median", "a step"), ("peak_bytes", "memory"))):
        found = exponents(values, [row[key] for row in rows if row["name"] == contender])
        told = f"{found['all']:.2f}, of the upper half {found['upper']:.2f}"
        remarks.append(f"{contender}: exponent of {cost} {told}")
        fitted[contender][key] = found
    facts = {"swept": name, "values": list(values)}
    return case_result(f"growth with {name}", _LABELS[name], facts, rows, exponents=fitted, remarks=remarks)


def small_problem(sizes: Mapping[str, int], reduce: str, steps: int, seed: int) -> MergeProblem:
    """A small tower of the sizes `tasks`, `layers` and `width`; its experts are state dicts, not files."""
    vision = cases.vit(sizes["width"], sizes["layers"], max(1, sizes["width"] // 64), 4, 28)
    case, base = MergeCase("growth", "a small tower", vision, 64), cases.random_clip(vision, 64, seed)
    options = dict(rank=RANK, batch_size=BATCH, reduce=reduce, steps=steps)
    expert = partial(cases.tuned_tower, base, seed=seed)
    return cases.synthetic(case, base, sizes["tasks"], options, expert, seed, classes=10, seeds=SEEDS)


def _step(
    name: str, sizes: Mapping[str, int], device: torch.device, reduce: str, steps: int, seed: int
) -> Row:
    """Seconds of the steps but the first, and the most bytes that one adaptation holds."""
    problem = small_problem(sizes, reduce, steps, seed)
    *past, new = comparison.history(problem, sizes["tasks"], seed)
    layers = [key.removesuffix(".A") for key in new if key.endswith(".A")]
    given = {layer: LowRankExpert(new[f"{layer}.A"], new[f"{layer}.B"]) for layer in layers}
    task = problem.expert(len(past)), problem.seeds(len(past)), given
    running, once = (contenders.start(name, problem, Stopwatch(device), past, steps=n) for n in (steps, 2))
    return summary(running.add(*task)) | {"peak_bytes": peak_bytes(lambda: once.add(*task), device) or 0}


def kept(device: torch.device, tasks: int, reduce: str, seed: int = 0) -> dict[str, Any]:
    """Bytes in living tensors after each of our merges, and how many are experts, gates, bases and heads."""
    problem = small_problem(FIXED | {"tasks": tasks, "width": 64}, reduce, 2, seed)
    task = problem.expert(0), problem.seeds(0)  # the same for all: what they are does not matter here
    running = contenders.start(OURS, problem, Stopwatch(device))
    assert isinstance(running, contenders.OurMerge)
    before = _held(device)
    held, accounted = [], []
    for _ in range(tasks):
        running.add(*task)
        held.append(_held(device) - before)
        of_layers = sum(getattr(one, name).nbytes for one in running.layers.values() for name in _OF_A_LAYER)
        own = sum(part.nbytes for one in running.merger.merged for part in one.kept().values())
        accounted.append(of_layers + own + sum(basis.nbytes for basis in running.bases().values()))
    rest, count = np.subtract(held, accounted), np.arange(1, tasks + 1)
    slope = float(np.polyfit(count, rest, 1)[0]) if tasks > 1 else 0.0
    found = {"tasks": count.tolist(), "held_bytes": held, "accounted_bytes": accounted}
    return found | {"unaccounted_bytes_per_task": slope, "ok": abs(slope) <= ALLOWED * accounted[-1] / tasks}


def _held(device: torch.device) -> int:
    """Bytes of all storages that living dense tensors share; a merge makes no others."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    here = (one for one in tensors if one.device.type == device.type and one.layout == torch.strided)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in here)}
    return sum(storages.values())


if __name__ == "__main__":
    raise SystemExit(main())
