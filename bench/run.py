"""The kernels' command line: ``python bench/run.py --quick``, or ``mingle bench --quick``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mingle.bench import command, judge, results, table
from mingle.bench.gated_experts import breakdown, cases, comparison, floor
from mingle.bench.gated_experts.cases import CASES, SELECTIONS, KernelCase, Selection
from mingle.bench.gated_experts.peers import PEERS, SLOW_TO_BUILD, STRATEGIES
from mingle.bench.measure import OURS, log
from mingle.bench.results import Results
from mingle.io.files import write_json
from mingle.io.provenance import device_name

_SECONDS = 5.0  # of timing for a case that was asked for by name
_HELP = {
    "quick": "two minutes on a CPU",
    "gpu": "ten minutes on a large GPU",
    "dispatch": 'does backend="auto" choose well?',
    "breakdown": "where the time goes on a CPU, and what limits it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a selection.  Returns 0, or 1 where a result of ours was wrong or failed, or a comparison found a regression."""
    parser = _parser()
    args = parser.parse_args(arguments)
    command.show_progress()
    if args.list:
        table.write_lines(_names())
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    is_breakdown = args.selection == "breakdown"
    if is_breakdown and (args.peer or args.plots or args.compare or args.device not in (None, "cpu")):
        parser.error("--breakdown takes none of --peer, --plots and --compare, and runs on the CPU")
    try:
        selection, peers = _selection(args, device), _peers(args)
        old = results.read(args.compare) if args.compare else None
        for folder in (args.out and args.out.parent, args.plots):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)  # better now than after ten minutes
    except (ValueError, OSError) as error:  # unknown names, a file that is not there or holds something else
        parser.error(str(error))
    found = (
        break_down(selection, args.seed)
        if is_breakdown
        else run(selection, peers, device, args.seed, args.until)
    )
    if args.out:
        write_json(args.out, found)
    if args.plots:
        command.write_plots(found, args.plots, "kernels")
    regressions = judge.regressions(old, found) if old else None
    table.write(found, regressions)
    return 1 if regressions or command.status(found) else 0


def break_down(selection: Selection, seed: int = 0) -> Results:
    began = time.monotonic()
    found = [breakdown.measure(case, selection.seconds, seed) for case in selection.cases]
    return results.envelope("breakdown", torch.device("cpu"), seed, found, (), began)


def run(
    selection: Selection,
    peers: Sequence[str],
    device: torch.device,
    seed: int = 0,
    until: float = float("inf"),
) -> Results:
    """The measurements of all cases that can be started before `until` seconds have passed.

    `peers`, where there are any, are all that is run; otherwise those that take long to build are left out of cases that are not
    `compiled`, and everywhere once `selection.build_until` seconds, or half of `until`, have passed.
    """
    began = time.monotonic()
    log.info("measuring the ceilings of %s", device_name(device))
    limits = floor.ceilings((case.dtype for case in selection.cases), device)
    found = []
    for case in selection.cases:
        passed = time.monotonic() - began
        if passed > until:
            log.warning("%s and all after it: not run, %.0f s have passed", case.name, passed)
            break
        chosen = peers or _default_peers(case, may_be_slow=passed < min(selection.build_until, until / 2))
        log.info("%s: %d peers, after %.0f s", case.name, len(chosen), passed)
        candidates = [PEERS[name] for name in chosen]
        found.append(comparison.measure(case, candidates, device, limits, selection.seconds, seed))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    more = {"ceilings": asdict(limits), "remarks": comparison.dispatch_remarks(found)}
    return results.envelope("kernels", device, seed, found, cases.TARGETS, began, **more)


def _default_peers(case: KernelCase, may_be_slow: bool) -> list[str]:
    return [name for name in PEERS if name not in SLOW_TO_BUILD or (case.compiled and may_be_slow)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mingle bench",
        description="Time the gated sum of experts against other ways to compute it, each checked against float64 first.",
        epilog="Without a selection: --gpu where there is a CUDA device, else --quick.",
    )
    select, add = parser.add_mutually_exclusive_group(), parser.add_argument
    for name, text in _HELP.items():
        select.add_argument(f"--{name}", action="store_const", const=name, dest="selection", help=text)
    several = dict(action="append", default=[], metavar="NAME")
    select.add_argument("--case", help="one case; may be repeated", **several)  # type: ignore[arg-type]
    add("--peer", help=f"beside {OURS!r} only this one; may be repeated", **several)  # type: ignore[arg-type]
    add("--out", type=Path, metavar="FILE.json", help="every number, as JSON")
    add("--plots", type=Path, metavar="DIR", help="bars per case and a roofline, as PNG")
    falls = "flag ratios to peers that fell by more than 10 %% since"
    add("--compare", type=Path, metavar="OLD.json", help=falls)
    late = "start no case after that many"
    add("--until", type=float, default=float("inf"), metavar="SECONDS", help=late)
    add("--device", help="cuda, cuda:1, cpu; by default a GPU where there is one")
    add("--seed", type=int, default=0, help="of the random tensors")
    add("--list", action="store_true", help="the names of selections, cases and peers")
    return parser


def _names() -> list[str]:
    chosen = [f"--{name}: {' '.join(case.name for case in s.cases)}\n" for name, s in SELECTIONS.items()]
    known = [f"--case {case.name:32}{case.shape}" for case in CASES.values()]
    return chosen + known + [f'--peer "{peer.name}": {peer.note}' for peer in PEERS.values()]


def _selection(args: argparse.Namespace, device: torch.device) -> Selection:
    if args.case:
        return Selection(tuple(cases.case(name) for name in args.case), _SECONDS)
    return SELECTIONS[args.selection or ("gpu" if device.type == "cuda" else "quick")]


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    """Ours first, which the ratios need; none for the default."""
    if args.peer:
        return tuple(dict.fromkeys([OURS, *(cases.known(name, PEERS, "peer") for name in args.peer)]))
    return STRATEGIES if args.selection == "dispatch" else ()


if __name__ == "__main__":
    raise SystemExit(main())
