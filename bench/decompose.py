"""What making a task's experts costs, beside LAPACK, cuSOLVER and torch.svd_lowrank: ``python bench/decompose.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from mingle.bench import command, results
from mingle.bench.decomposition import cases, comparison
from mingle.bench.decomposition.cases import ACCURATE, CASES, ExpertCase
from mingle.bench.decomposition.comparison import Budget
from mingle.bench.decomposition.peers import peers, pipelines
from mingle.bench.measure import OURS, log
from mingle.bench.results import Results

#: seconds of timing per peer and shape, and on a GPU of a case after which no further peer is begun
_SECONDS, _QUICK_SECONDS, _GPU_CASE_SECONDS = 1.0, 0.4, 80.0
_METHOD = (
    "seconds of a task: the sum over shapes of the seconds per layer, measured on `timed_layers` of them, "
    "times the count of layers"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for.  Returns 0, or 1 where a result of ours was wrong or failed."""
    parser = command.parser("Time the decompositions behind a task's experts, each checked against LAPACK.")
    models = "the layers of which model; all take ten minutes on a CPU"
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help=models)
    parser.add_argument("--quick", action="store_true", help="the layers of a ViT-B only, in two minutes")
    args = command.begin(parser, arguments)
    if args.quick and args.case not in ("all", "vit-b"):
        parser.error(f"--quick measures vit-b, not {args.case}")
    chosen = ["vit-b"] if args.quick else list(CASES) if args.case == "all" else [args.case]
    seconds = _QUICK_SECONDS if args.quick else _SECONDS
    found = ((name, run(CASES[name], args.device, seconds, args.seed)) for name in chosen)
    return max([command.finish(results, args.out, name) for name, results in found])


def run(case: ExpertCase, device: torch.device, seconds: float, seed: int = 0) -> Results:
    """Both parts of one case, shape by shape and for the whole task."""
    began = time.monotonic()
    budget = Budget(seconds, began + _GPU_CASE_SECONDS if device.type == "cuda" else float("inf"))
    decomposed, projected = [], []
    for shape in case.shapes:
        log.info("%s: %s", case.name, shape.name)
        problem = cases.make(case, shape, shape.count if device.type == "cuda" else 1, device, seed)
        decomposed.append(comparison.decompositions(problem, peers(device), budget, seed))
        projected.append(comparison.pipelines(problem, pipelines(device), budget, seed))
    wholes = [
        comparison.whole(case, "decompose", decomposed, ACCURATE),
        comparison.whole(case, "project", projected, OURS),
    ]
    model = asdict(case) | {"layers": case.layers, "spectrum": cases.SPECTRUM}
    found = [*decomposed, *projected, *wholes]
    return results.envelope("experts", device, seed, found, cases.TARGETS, began, model=model, method=_METHOD)


if __name__ == "__main__":
    raise SystemExit(main())
