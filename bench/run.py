"""The kernels' command line: ``python bench/run.py --quick``, or ``mingle bench --quick``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from mingle.bench import command, judge, record, table
from mingle.bench.gated_experts import cases, check, floor, inputs
from mingle.bench.gated_experts.cases import CASES, SELECTIONS, KernelCase, Selection
from mingle.bench.gated_experts.floor import Ceilings
from mingle.bench.gated_experts.peers import PEERS, SLOW_TO_BUILD, STRATEGIES, KernelPeer
from mingle.bench.measure import OURS, Contestant, Rounds, Row, Run, compare, log, verdict
from mingle.bench.record import CaseResult, Results, case_result
from mingle.io.files import file_path, json_text, made, write_json
from mingle.io.provenance import device_name
from mingle.options import a_device, one_of
from mingle.text import visible

_SECONDS = 5.0  # of timing for a case that was asked for by name
#: `backend="auto"` should be within this factor of the best strategy
DISPATCH_LIMIT = 1.10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a selection.  Returns 1 where a result of ours was wrong or failed, or regressed, else 0."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    command.show_progress(quiet=args.quiet)
    if args.list and args.json:
        chosen_cases = {name: [case.name for case in one.cases] for name, one in SELECTIONS.items()}
        titles = {name: case.title for name, case in CASES.items()}
        notes = {name: peer.note for name, peer in PEERS.items()}
        sys.stdout.write(json_text({"selections": chosen_cases, "cases": titles, "peers": notes}))
        return 0
    if args.list:
        chosen = (f"--{name}: {' '.join(case.name for case in s.cases)}\n" for name, s in SELECTIONS.items())
        known = (f"--case {case.name:32}{case.title}" for case in CASES.values())
        peer_notes = (f'--peer "{peer.name}": {peer.note}' for peer in PEERS.values())
        table.write_lines([*chosen, *known, *peer_notes])
        return 0
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = args.selection or ("gpu" if device.type == "cuda" else "quick")
    try:
        old = record.read(args.compare) if args.compare else None
        for folder in (args.out and args.out.parent, args.plots):
            if folder:
                made(folder)
        if args.out and args.out.is_dir():
            raise ValueError(f"{args.out}: a folder, expected a file")
    except ValueError as error:  # a file that is not there or holds something else
        parser.error(visible(str(error)))
    named = tuple(CASES[case] for case in args.case)
    selection = Selection(named, _SECONDS) if named else SELECTIONS[name]
    peers = args.peer or (STRATEGIES if name == "dispatch" else ())
    keep = partial(write_json, args.out) if args.out else lambda found: None
    found = run(selection, peers, device, args.seed, args.until, keep)
    if args.plots:
        from mingle.bench import plot  # matplotlib only where it is used

        plot.write_plots(found, args.plots, "kernels")
    regressions = judge.regressions(old, found) if old else None
    if args.json:
        sys.stdout.write(json_text(found | {"regressions": regressions}))
    else:
        table.write(found, regressions)
    return 1 if regressions or command.status(found) else 0


def make_parser() -> argparse.ArgumentParser:
    about = "Time the gated sum of experts beside other ways to compute it, each checked first."
    default = "Without a selection: --gpu where there is a CUDA device, else --quick."
    parser = argparse.ArgumentParser(prog="mingle bench", description=about, epilog=default)
    select, add = parser.add_mutually_exclusive_group(), parser.add_argument
    several: dict[str, Any] = dict(action="append", default=[], metavar="NAME")
    for name, selection in SELECTIONS.items():
        help = selection.about
        select.add_argument(f"--{name}", action="store_const", const=name, dest="selection", help=help)
    a_case, a_peer = one_of(CASES, "case"), one_of(PEERS, "peer")
    select.add_argument("--case", type=a_case, help="one case; may be repeated", **several)
    add("--peer", type=a_peer, help=f"beside {OURS!r} only this one; may be repeated", **several)
    add("--out", type=file_path, metavar="FILE.json", help="every number, as JSON")
    add("--plots", type=file_path, metavar="DIR", help="bars per case and a roofline, as PNG")
    flagged = "flag ratios to peers that fell by more than 10 %% since"
    add("--compare", type=file_path, metavar="OLD.json", help=flagged)
    add("--until", type=float, default=math.inf, metavar="SECONDS", help="start no case after that many")
    add("--device", type=a_device, help="cuda, cuda:1, cpu; by default a GPU where there is one")
    add("--seed", type=int, default=0, help="of the random tensors")
    add("--list", action="store_true", help="the names of selections, cases and peers")
    add("--json", action="store_true", help="print the results as one JSON document")
    add("--quiet", action="store_true", help="print nothing but errors and results")
    return parser


def run(
    selection: Selection, peers: Sequence[str], device: torch.device, seed: int = 0, until: float = math.inf,
    keep: Callable[[Results], object] = lambda found: None,
) -> Results:  # fmt: skip
    """The measurements of all cases that can be started before `until` seconds have passed.

    `keep` gets all there is after each case.  Without `peers` ours is run beside all, but what takes long to
    build only in `compiled` cases, and not after `selection.build_until` seconds or half of `until`.
    """
    began, found = time.monotonic(), list[CaseResult]()
    log.info("measuring the ceilings of %s", device_name(device))
    limits = floor.ceilings((case.dtype for case in selection.cases), device)

    def so_far() -> Results:
        judged = {case["name"]: case["dispatch"] for case in found if case["dispatch"]}
        bad = {name: one for name, one in judged.items() if not one["within_limit"]}
        good = f"{len(judged) - len(bad)} of {len(judged)}"
        remarks = [f'backend="auto" is within 10 % of the best strategy in {good} cases']
        remarks += [f"{name}: {b['auto_over_best']:.2f}× the time of {b['best']}" for name, b in bad.items()]
        facts = dict(ceilings=asdict(limits), remarks=remarks)
        return record.envelope("kernels", device, seed, found, cases.TARGETS, began, **facts)

    for case in selection.cases:
        passed = time.monotonic() - began
        if passed > until:
            log.warning("%s and all after it: not run, %.0f s have passed", case.name, passed)
            break
        may_be_slow = case.compiled and passed < min(selection.build_until, until / 2)
        default = [name for name in PEERS if name not in SLOW_TO_BUILD or may_be_slow]
        chosen = [PEERS[name] for name in dict.fromkeys([OURS, *(peers or default)])]
        log.info("%s: %d peers, after %.0f s", case.name, len(chosen), passed)
        found.append(measure(case, chosen, device, limits, selection.seconds, seed))
        torch.cuda.empty_cache()  # which does nothing without one
        keep(so_far())
    return so_far()


def measure(
    case: KernelCase, peers: Sequence[KernelPeer], device: torch.device, limits: Ceilings, seconds: float,
    seed: int = 0,
) -> CaseResult:  # fmt: skip
    """Everything about one case; `seconds` bounds the time of the timing rounds."""
    case_inputs = inputs.make(case, device, seed)
    oracle = check.Oracle(case_inputs)

    def prepare(peer: KernelPeer) -> tuple[Run, Row]:
        adapted = peer.adapt(case_inputs)
        run = peer.build(adapted)
        if not peer.same(adapted.case):
            run()
            return run, {"status": "bound", "errors": None}
        own = oracle if adapted is case_inputs else check.Oracle(adapted)
        return run, verdict(own.errors(run), check.tolerance(adapted.x.dtype, device))

    those = [Contestant(p.name, partial(prepare, p), {"note": p.note}, memory=not p.captured) for p in peers]
    rows, others = compare(those, device, Rounds(seconds, flush=True), seed)
    least, bound = floor.floor(case, limits)
    for row in rows:
        if "median" in row and row["status"] == "ok":  # bounds do less work
            row["floor_fraction"] = least / row["median"]
    found = case_result(case.name, case.title, asdict(case), rows, cpus_used_by_others=others)
    found["dispatch"] = judge.choice(judge.by_name(found), STRATEGIES[1:], DISPATCH_LIMIT)
    return found | {"count": asdict(floor.count(case)), "floor": {"seconds": least, "bound": bound}}


if __name__ == "__main__":
    raise SystemExit(main())
