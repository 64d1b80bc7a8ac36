"""What a whole continual merge costs: ``python bench/e2e.py``, against plain formulas with full SVDs and the
published procedure.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mingle.bench import machine
from mingle.bench.endtoend import cases, growth, judge, plots, show, staged, whole
from mingle.bench.endtoend.cases import CASES, Case
from mingle.bench.endtoend.contenders import BF16, EAGER, LEFT_OUT, OURS, PUBLISHED
from mingle.io.files import write_json

_log = logging.getLogger("mingle.bench")

FORMAT, FORMAT_VERSION = "mingle-e2e", 1
PEERS = {"eager": EAGER, "published": PUBLISHED}
_ROUNDS, _STEPS, _MEASURED_STEPS = 3, 50, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case, or the growth curves.  Returns 0, or 1 where gates did not agree or memory grew beyond
    what is kept.
    """
    args = _arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    _quiet()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # better now than after ten minutes
    device = torch.device("cuda" if args.gpu else "cpu")
    if args.growth:
        name, results = "growth", grow(device, args.reduce, args.quick, args.seed)
    else:
        peers = [PEERS[peer] for peer in args.peer]
        names = [OURS, *([BF16] if args.precision == "bf16" else []), *peers]
        case = CASES[args.case]
        results = run(
            case, args.tasks, names, device, args.reduce, args.steps, quick=args.quick, seed=args.seed
        )
        beside = "" if len(peers) == len(PEERS) else f"-{args.peer[0]}" if peers else "-alone"
        name = f"{case.name}-{results['case']['tasks']}-{args.reduce}{beside}"
    if args.out:
        write_json(args.out / f"{name}.json", results)
        for path in plots.write_plots(results, args.out, name):
            _log.info("wrote %s", path)
    if args.growth:
        show.write_growth(results)
        return 0 if results["kept"]["ok"] else 1
    show.write(results)
    return (
        1 if any(result["status"] not in ("ok", LEFT_OUT) for result in results["contenders"].values()) else 0
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time whole continual merges, each contender's gates checked against ours first."
    )
    parser.add_argument(
        "--case",
        choices=CASES,
        default="glyphs8",
        help="the embedded suite, or a CLIP of that size with random weights",
    )
    parser.add_argument(
        "--tasks", type=int, default=8, choices=(2, 3, 8, 20), help="how many models are merged"
    )
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--peer", choices=PEERS, action="append", help="only this one beside ours")
    beside.add_argument(
        "--alone",
        action="store_const",
        const=[],
        dest="peer",
        help="ours alone, as for the others memory may not suffice",
    )
    parser.add_argument(
        "--reduce",
        choices=("batch", "sample", "token"),
        default="batch",
        help="what gates see; as published by default",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 adds ours with bf16 products"
    )
    parser.add_argument(
        "--steps", type=int, help="of adaptation to be timed: 50, or 4 where the whole is a sum"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two tasks, few steps, one round: does it work at all?"
    )
    parser.add_argument(
        "--growth", action="store_true", help="instead: how a step's cost grows with tasks, layers and width"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="on the current CUDA device; ours is then timed as a whole for every case",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="every number as JSON, and plots")
    parser.add_argument("--seed", type=int, default=0, help="of synthetic models and samples")
    args = parser.parse_args(arguments)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no CUDA device")
    if args.steps is not None and args.steps < 3:
        parser.error("--steps: at least 3, as the first is not timed")
    if args.reduce == "token" and "published" in (args.peer or ()):
        parser.error("--peer published: gates of single tokens were not published")
    if args.peer is None:
        args.peer = [
            name for name, peer in PEERS.items() if not (args.reduce == "token" and peer == PUBLISHED)
        ]
    return args


def run(
    case: Case,
    tasks: int,
    names: Sequence[str],
    device: torch.device,
    reduce: str = "batch",
    steps: int | None = None,
    *,
    quick: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The measurements of one case, as plain data."""
    began = time.monotonic()
    tasks = min(tasks, 2) if quick else tasks
    is_whole = case.vision is None
    options = {"reduce": reduce, "steps": (steps or (5 if quick else _STEPS)) if is_whole else _STEPS}
    with cases.problem(case, tasks, options, seed) as problem:
        if is_whole:
            found = whole.measure(problem, names, device, 1 if quick else _ROUNDS)
        else:
            found = staged.measure(
                problem, names, device, steps or (3 if quick else _MEASURED_STEPS), _counts(tasks), seed
            )
            if device.type == "cuda" and not quick:
                for name in [
                    name for name in names if name in (OURS, BF16) and found[name]["status"] == "ok"
                ]:
                    found[name] |= {"sum": {key: found[name][key] for key in ("stages", "whole_seconds")}}
                    found[name] |= whole.summary([whole.run(problem, name, device)])
        facts = {
            "name": case.name,
            "title": case.title,
            "tasks": tasks,
            "options": problem.options,
            "seeds": len(problem.seeds(0)),
        }
    mode = whole if is_whole else staged
    results = {
        **_provenance(device, seed),
        "quick": quick,
        "case": facts | {"data": "the suite's own" if is_whole else cases.SYNTHETIC},
        "mode": mode.MODE,
        "method": mode.METHOD,
        "contenders": found,
        "ratios": judge.ratios(found),
    }
    return results | {"targets": judge.targets(results), "seconds": time.monotonic() - began}


def grow(device: torch.device, reduce: str, quick: bool, seed: int = 0) -> dict[str, Any]:
    """The growth curves, as plain data."""
    began = time.monotonic()
    sweeps, tasks, steps = (growth.QUICK, 4, 3) if quick else (growth.SWEEPS, 64, 6)
    found = growth.run(device, reduce, sweeps, tasks, steps, seed)
    return {
        **_provenance(device, seed),
        "quick": quick,
        "reduce": reduce,
        **found,
        "seconds": time.monotonic() - began,
    }


def _quiet() -> None:
    """No progress bars of transformers between the lines."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _counts(tasks: int) -> list[int]:
    """The numbers of tasks at which a step is timed: the fewest and the most, as its cost is linear between
    them.
    """
    return sorted({1, tasks})


def _provenance(device: torch.device, seed: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine.describe(device),
        "seed": seed,
    }


if __name__ == "__main__":
    raise SystemExit(main())
