"""What making a task's experts costs: ``python bench/decompose.py``, compared with LAPACK, cuSOLVER and
torch.svd_lowrank.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mingle.bench import machine
from mingle.bench.decomposition import cases, judge, measure, plots, predict, show
from mingle.bench.decomposition.cases import CASES, Case
from mingle.bench.decomposition.measure import Budget
from mingle.bench.decomposition.peers import ACCURATE, OURS, peers
from mingle.bench.decomposition.pipelines import pipelines
from mingle.io.files import write_json

_log = logging.getLogger("mingle.bench")

FORMAT, FORMAT_VERSION = "mingle-decompose", 1
#: seconds of timing per peer and shape, and on a GPU of a case after which no further peer is begun
_SECONDS, _QUICK_SECONDS, _GPU_CASE_SECONDS = 1.0, 0.4, 80.0
_METHOD = "seconds of a task: the sum over shapes of the seconds per layer, measured on `timed_layers` of them, times the count of layers"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases asked for.  Returns 0, or 1 where a result of ours was wrong or failed."""
    parser = argparse.ArgumentParser(
        description="Time the decompositions behind a task's experts, each checked against LAPACK in float64."
    )
    parser.add_argument(
        "--case",
        choices=[*CASES, "all"],
        default="all",
        help="the layers of which model; all take ten minutes on a CPU",
    )
    parser.add_argument("--quick", action="store_true", help="the layers of a ViT-B only, in two minutes")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="on the current CUDA device, all layers of a shape together, in five minutes",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="every number as CASE.json, and the curves as CASE.png"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the task vectors")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no CUDA device")
    if args.quick and args.case not in ("all", "vit-b"):
        parser.error(f"--quick measures vit-b, not {args.case}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # better now than after ten minutes
    device = torch.device("cuda" if args.gpu else "cpu")
    chosen = ["vit-b"] if args.quick else list(CASES) if args.case == "all" else [args.case]
    failed = False
    for name in chosen:
        results = run(CASES[name], device, _QUICK_SECONDS if args.quick else _SECONDS, args.seed)
        if args.out:
            write_json(args.out / f"{name}.json", results)
            for path in plots.write_plots(results, args.out):
                _log.info("wrote %s", path)
        show.write(results)
        ours = [
            peer
            for part in show.PARTS
            for shape in results[part]
            for key, peer in shape["peers"].items()
            if key.startswith(OURS)
        ]
        failed |= any(peer["status"] in ("wrong", "failed") for peer in ours)
    return 1 if failed else 0


def run(case: Case, device: torch.device, seconds: float, seed: int = 0) -> dict[str, Any]:
    """The measurements of one case, as plain data."""
    began = time.monotonic()
    budget = Budget(seconds, began + _GPU_CASE_SECONDS if device.type == "cuda" else float("inf"))
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in show.PARTS}
    for shape in case.shapes:
        _log.info("%s: %s", case.name, shape.name)
        problem = cases.make(case, shape, shape.count if device.type == "cuda" else 1, device, seed)
        found["decompose"].append(measure.decompositions(problem, peers(device), budget, seed))
        found["project"].append(measure.pipelines(problem, pipelines(device), budget, seed))
    results = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(device),
        "seed": seed,
        "case": asdict(case) | {"layers": cases.total_layers(case.shapes), "spectrum": cases.SPECTRUM},
        "method": _METHOD,
        **found,
        "totals": {
            part: judge.totals(found[part], ours)
            for part, ours in (("decompose", ACCURATE), ("project", OURS))
        },
        "prediction": predict.predict(case),
    }
    return results | {"targets": judge.targets(results), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    raise SystemExit(main())
