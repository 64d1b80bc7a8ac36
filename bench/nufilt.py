"""What NUFILT's training costs: ``python bench/nufilt.py``, against a training that computes every product
anew at each step.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mingle.bench import machine
from mingle.bench.decomposition import cases
from mingle.bench.decomposition.cases import Case, Shape
from mingle.bench.decomposition.measure import timed
from mingle.bench.measure import relative, summary
from mingle.bench.peers.filter_lora import Layer, train
from mingle.io.files import write_json
from mingle.linalg.arithmetic import buckets, stacked
from mingle.linalg.sketch import gaussian
from mingle.methods import nufilt
from mingle.methods.nufilt import NufiltOptions

_log = logging.getLogger("mingle.bench")

FORMAT, FORMAT_VERSION = "mingle-nufilt", 1
OURS, PUBLISHED = "mingle", "published training"
#: the published training should take so many times as long as ours, per step
TARGET = 10.0
#: relative error of a layer's trained update, against the published training in float64
TOLERANCE = 1e-4
CASE = Case(
    "vit-b-32", "attention and fc1 of a ViT-B/32", (Shape(768, 768, 48), Shape(3072, 768, 12)), earlier=0
)
_METHOD = (
    "seconds per step, of all layers: ours from whole trainings, what is made once per layer included; the published training from a few "
    "steps in a row, as all its steps are alike.  Medians over rounds, in which both take turns.  Singular vectors are given to both."
)


@dataclass(frozen=True)
class Plan:
    """What is run: settings of the method, rounds, steps of the published training in a round, and seconds
    after which no round begins.
    """

    options: NufiltOptions = field(default_factory=NufiltOptions)
    rounds: int = 7
    peer_steps: int = 4
    seconds: float = 100.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it.  Returns 0, or 1 where a result of ours was wrong."""
    parser = argparse.ArgumentParser(
        description="Time NUFILT's training steps at the sizes of a ViT-B/32, results checked first."
    )
    parser.add_argument(
        "--quick", action="store_true", help="one layer of each shape, two rounds: does it work at all?"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender is timed")
    parser.add_argument(
        "--gpu", action="store_true", help="on the current CUDA device, all layers of a shape together"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="every number as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the task vectors")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no CUDA device")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    shapes = tuple(Shape(shape.m, shape.n, 1) for shape in CASE.shapes) if args.quick else CASE.shapes
    case = Case(CASE.name, CASE.title, shapes, earlier=0)
    results = run(
        case,
        Plan(rounds=2 if args.quick else args.rounds),
        torch.device("cuda" if args.gpu else "cpu"),
        args.seed,
    )
    if args.out:
        write_json(args.out / f"{case.name}.json", results)
    for name, found in results["contenders"].items():
        _log.info(
            "%s: %s",
            name,
            found.get("reason") or f"{1e3 * found['median']:.1f} ms a step, {found['ratio']:.2f}× ours",
        )
    return 1 if results["contenders"][OURS]["status"] != "ok" else 0


def run(case: Case, plan: Plan, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """The measurements, as plain data."""
    began = time.monotonic()
    layers, vectors_seconds = make(case, plan.options, device, seed)
    _log.info("%d layers; their singular vectors took %.1f s", len(layers), vectors_seconds)
    found = measure(layers, plan, device)
    ratio = found[PUBLISHED].get("round_ratio")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(device),
        "seed": seed,
        "case": {
            "name": case.name,
            "title": case.title,
            "shapes": [asdict(shape) for shape in case.shapes],
            "layers": len(layers),
            "spectrum": cases.SPECTRUM,
        },
        "options": asdict(plan.options),
        "method": _METHOD,
        "contenders": found,
        "singular_vectors_seconds": vectors_seconds,
        "targets": []
        if ratio is None
        else [{"peer": PUBLISHED, "ratio": TARGET, "found": ratio, "met": ratio >= TARGET}],
        "seconds": time.monotonic() - began,
    }


def make(case: Case, options: NufiltOptions, device: torch.device, seed: int) -> tuple[list[Layer], float]:
    """The layers of a second task, with the singular vectors both contenders are given, and the seconds that
    those took.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for shape in case.shapes:
        deltas, merged = (
            cases.make(case, shape, shape.count, device, 2 * seed + part).deltas for part in (0, 1)
        )
        pairs += zip(deltas, merged, strict=True)
    names = [f"layer {i}" for i in range(len(pairs))]
    deltas, merged = [delta for delta, _ in pairs], [M for _, M in pairs]
    seconds, (old, new) = timed(
        lambda: (
            nufilt.right_vectors(merged, options.r_p, names),
            nufilt.right_vectors(deltas, options.r_v, names),
        ),
        device,
    )
    starts = [
        nufilt.INIT_STD
        * gaussian(seed, [name], min(options.r_l, *delta.shape), delta.shape[1], device, delta.dtype)[0]
        for name, delta in zip(names, deltas, strict=True)
    ]
    return [Layer(*parts) for parts in zip(deltas, merged, old, new, starts, strict=True)], seconds


def ours(layers: Sequence[Layer], steps: int, lr: float) -> list[tuple[Tensor, Tensor]]:
    """As `mingle.methods.nufilt.updates` trains: the layers of a shape together on a GPU, one after the other
    on a CPU.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for places in buckets([layer.delta for layer in layers]):
        A, B = nufilt.trained(
            *(stacked(list(part)) for part in zip(*(layers[i] for i in places), strict=True)), steps, lr
        )
        results |= dict(
            zip(
                places,
                zip(A.view(len(places), *A.shape[-2:]), B.view(len(places), *B.shape[-2:]), strict=True),
                strict=True,
            )
        )
    return [results[i] for i in range(len(layers))]


def measure(layers: Sequence[Layer], plan: Plan, device: torch.device) -> dict[str, dict[str, Any]]:
    """By contender its status and errors, and where it is right the seconds per step."""
    options = plan.options
    found = check(layers, options)
    steps = {OURS: options.steps, PUBLISHED: plan.peer_steps}
    runs = {OURS: ours, PUBLISHED: train}
    times: dict[str, list[float]] = {name: [] for name in runs if found[name]["status"] == "ok"}
    load = machine.Load()
    gc.collect()
    gc.disable()
    try:
        began = time.monotonic()
        for number in range(plan.rounds + 1):  # the first one warms up
            if number > 2 and time.monotonic() - began > plan.seconds:
                break
            order = list(times) if number % 2 else list(reversed(times))
            for name in order:
                seconds, _ = timed(partial(runs[name], layers, steps[name], options.lr), device)
                _log.info("%s: %.1f s for %d steps", name, seconds, steps[name])
                if number:
                    times[name].append(seconds / steps[name])
    finally:
        gc.enable()
    others = load.others()
    for name, series in times.items():
        found[name] |= summary(series) | {"steps_in_a_row": steps[name], "cpus_used_by_others": others}
        if OURS in times:
            found[name] |= relative(series, times[OURS])
    return found


def check(layers: Sequence[Layer], options: NufiltOptions) -> dict[str, dict[str, Any]]:
    """Each contender's trained update ΔBA on one layer of every shape, against the published training in
    float64.
    """
    firsts = list({layer.delta.shape: layer for layer in reversed(layers)}.values())
    exact = train([Layer(*(part.double() for part in layer)) for layer in firsts], options.steps, options.lr)
    found: dict[str, dict[str, Any]] = {}
    for name, contender in ((OURS, ours), (PUBLISHED, train)):
        errors = {
            "×".join(map(str, layer.delta.shape)): _error(layer.delta, pair, truth)
            for layer, pair, truth in zip(
                firsts, contender(firsts, options.steps, options.lr), exact, strict=True
            )
        }
        found[name] = {"status": "ok", "errors": errors, "tolerance": TOLERANCE}
        if not all(error <= TOLERANCE for error in errors.values()):
            found[name] |= {"status": "wrong", "reason": f"off by {errors}, allowed {TOLERANCE}"}
            _log.warning("%s is WRONG: %s", name, found[name]["reason"])
    return found


def _error(delta: Tensor, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    (A, B), (A_exact, B_exact) = found, exact
    update, truth = (delta.double() @ b.double() @ a.double() for a, b in ((A, B), (A_exact, B_exact)))
    return ((update - truth).norm() / truth.norm()).item()


if __name__ == "__main__":
    raise SystemExit(main())
