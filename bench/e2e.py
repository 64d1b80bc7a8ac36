"""What a whole continual merge costs, beside the published procedure: ``python bench/e2e.py``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from transformers.utils import logging as transformers_logging

from mingle.bench import command, record
from mingle.bench.measure import OURS
from mingle.bench.merges import cases, comparison
from mingle.bench.merges.cases import BF16, CASES, EAGER, PUBLISHED, MergeCase
from mingle.bench.record import Results, case_result

PEERS = {"eager": EAGER, "published": PUBLISHED}
_ROUNDS, _STEPS, _MEASURED_STEPS = 3, 50, 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one case.  Returns 1 where gates did not agree, else 0."""
    args = _arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    peers = [PEERS[peer] for peer in args.peer]
    names = [OURS, *([BF16] if args.precision == "bf16" else []), *peers]
    tasks = min(args.tasks, 2) if args.quick else args.tasks
    settings = dict(reduce=args.reduce, steps=args.steps, quick=args.quick, seed=args.seed)
    found = run(CASES[args.case], tasks, names, args.device, **settings)
    beside = "" if len(peers) == len(PEERS) else f"-{args.peer[0]}" if peers else "-alone"
    name = f"{args.case}-{found['cases'][0]['facts']['tasks']}-{args.reduce}{beside}"
    return command.finish(found, args.out, name, peers_too=True)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("Time whole continual merges, each contender's gates checked against ours first.")
    add = parser.add_argument
    sizes = "the embedded suite, or a CLIP of that size with random weights"
    add("--case", choices=CASES, default="glyphs8", help=sizes)
    add("--tasks", type=int, default=8, choices=(2, 3, 8, 20), help="how many models are merged")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--peer", choices=PEERS, action="append", help="only this one beside ours")
    alone = "ours alone, as for the others memory may not suffice"
    beside.add_argument("--alone", action="store_const", const=[], dest="peer", help=alone)
    seen = "what gates see; as published by default"
    add("--reduce", choices=("batch", "sample", "token"), default="batch", help=seen)
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 adds ours with bf16 products")
    add("--steps", type=int, help="of adaptation to be timed: 50, or 4 where the whole is a sum")
    args = command.begin(parser, arguments)
    if args.steps is not None and args.steps < 3:
        parser.error("--steps: at least 3, as the first is not timed")
    if args.reduce == "token" and "published" in (args.peer or ()):
        parser.error("--peer published: gates of single tokens were not published")
    if args.peer is None:
        args.peer = ["eager"] if args.reduce == "token" else list(PEERS)
    return args


def run(
    case: MergeCase, tasks: int, names: Sequence[str], device: torch.device, *, reduce: str = "batch",
    steps: int | None = None, quick: bool = False, seed: int = 0,
) -> Results:  # fmt: skip
    """The measurements of one case; on a GPU ours is timed as a whole for every case."""
    began = time.monotonic()
    is_whole = case.vision is None
    options = {"reduce": reduce, "steps": (steps or (5 if quick else _STEPS)) if is_whole else _STEPS}
    with cases.problem(case, tasks, options, seed) as problem:
        if is_whole:
            rows = comparison.whole(problem, names, device, 1 if quick else _ROUNDS, seed)
        else:
            # a step's cost is linear in the number of tasks: the fewest and the most are measured
            at, few = sorted({1, tasks}), steps or (3 if quick else _MEASURED_STEPS)
            rows = comparison.staged(problem, names, device, few, at, seed)
            for row in rows if device.type == "cuda" and not quick else ():
                if row["name"] in (OURS, BF16) and row["status"] == "ok":
                    row["sum"] = {key: row[key] for key in ("stages", "median")}
                    row |= comparison.of_runs([comparison.run(problem, row["name"], device)])
        facts = {"tasks": tasks, "options": problem.options, "seeds": len(problem.seeds(0))}
    comparison.relate(rows)
    method = comparison.WHOLE if is_whole else comparison.STAGED
    parts = "" if is_whole else "; a sum of parts"
    title = f"Merging {tasks} tasks into {case.title}, gates of a {reduce}{parts}"
    more = {} if is_whole else {"remarks": [f"a sum, not a measured whole: {method}"]}
    facts |= {"model": case.title, "data": "the suite's own" if is_whole else cases.SYNTHETIC}
    found = [case_result(f"{case.name}, {tasks} tasks", title, facts, rows, **more)]
    about = {"quick": quick, "mode": "whole" if is_whole else "staged", "method": method}
    asked = () if quick else cases.TARGETS
    return record.envelope("merges", device, seed, found, asked, began, **about)


if __name__ == "__main__":
    raise SystemExit(main())
