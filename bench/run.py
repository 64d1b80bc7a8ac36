"""The benchmark's command line: ``python bench/run.py --quick``, or ``mingle bench --quick``."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mingle.bench import floor, judge, machine, measure, registry, table
from mingle.bench.peers import OURS, PEERS, STRATEGIES
from mingle.bench.registry import CASES, SELECTIONS, SLOW_TO_BUILD, Case, Selection
from mingle.io.files import CheckpointError, read_json, write_json

_log = logging.getLogger("mingle.bench")

FORMAT, FORMAT_VERSION = "mingle-bench", 1
_SECONDS = 5.0  # of timing for a case that was asked for by name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a selection.  Returns 0, or 1 where a result of ours was wrong or failed, or a comparison found a
    regression.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    if args.list:
        table.write_names(
            {name: [case.name for case in s.cases] for name, s in SELECTIONS.items()}, CASES, PEERS
        )
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.selection == "breakdown":
        return _break_down(parser, args)
    try:
        selection, peers = _selection(args, device), _peers(args)
        old = _earlier(args.compare) if args.compare else None
        for folder in (args.out and args.out.parent, args.plots):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)  # better now than after ten minutes
    except (ValueError, OSError) as error:  # unknown names, a file that is not there or holds something else
        parser.error(str(error))
    results = run(selection, peers, device, args.seed, args.until)
    if args.out:
        write_json(args.out, results)
    if args.plots:
        from mingle.bench import plot

        for path in plot.write_plots(results, args.plots):
            _log.info("wrote %s", path)
    regressions = judge.regressions(old, results) if old else None
    table.write(results, regressions)
    ours = [
        peer["status"]
        for case in results["cases"]
        for name, peer in case["peers"].items()
        if name.startswith(OURS)
    ]
    return 1 if regressions or "wrong" in ours or "failed" in ours else 0


def _break_down(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from mingle.bench import breakdown

    if args.peer or args.plots or args.compare or args.device not in (None, "cpu"):
        parser.error("--breakdown takes none of --peer, --plots and --compare, and runs on the CPU")
    selection = SELECTIONS["breakdown"]
    found = [breakdown.measured(case, selection.seconds, args.seed) for case in selection.cases]
    results = {
        "format": "mingle-breakdown",
        "format_version": 1,
        **_provenance(torch.device("cpu"), args.seed),
        "cases": found,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
    table.write_breakdown(results)
    return 0


def _provenance(device: torch.device, seed: int) -> dict[str, Any]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine.describe(device), "seed": seed}


def run(
    selection: Selection,
    peers: Sequence[str],
    device: torch.device,
    seed: int = 0,
    until: float = float("inf"),
) -> dict[str, Any]:
    """The measurements of all cases that can be started before `until` seconds have passed, as plain data.

    `peers`, where there are any, are all that is run; otherwise those that take long to build are left out of
    cases that are not `compiled`, and everywhere once `selection.build_until` seconds, or half of `until`,
    have passed.
    """
    began = time.monotonic()
    _log.info("measuring the ceilings of %s", machine.device_name(device))
    limits = floor.ceilings((case.dtype for case in selection.cases), device)
    cases = []
    for case in selection.cases:
        passed = time.monotonic() - began
        if passed > until:
            _log.warning("%s and all after it: not run, %.0f s have passed", case.name, passed)
            break
        chosen = peers or _default_peers(case, may_be_slow=passed < min(selection.build_until, until / 2))
        _log.info("%s: %d peers, after %.0f s", case.name, len(chosen), passed)
        cases.append(
            measure.measure(
                case, [PEERS[name] for name in chosen], device, limits, seconds=selection.seconds, seed=seed
            )
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **_provenance(device, seed),
        "seconds": time.monotonic() - began,
        "ceilings": {"flop_per_second": limits.flop_per_second, "bytes_per_second": limits.bytes_per_second},
        "cases": cases,
        "targets": judge.targets(cases),
    }


def _default_peers(case: Case, may_be_slow: bool) -> list[str]:
    return [name for name in PEERS if name not in SLOW_TO_BUILD or (case.compiled and may_be_slow)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mingle bench",
        description="Time the gated sum of experts against other ways to compute it, each checked against float64 first.",
        epilog="Without a selection: --gpu where there is a CUDA device, else --quick.",
    )
    select = parser.add_mutually_exclusive_group()
    select.add_argument(
        "--quick", action="store_const", const="quick", dest="selection", help="two minutes on a CPU"
    )
    select.add_argument(
        "--gpu", action="store_const", const="gpu", dest="selection", help="ten minutes on a large GPU"
    )
    select.add_argument(
        "--dispatch",
        action="store_const",
        const="dispatch",
        dest="selection",
        help='does backend="auto" choose well?',
    )
    select.add_argument(
        "--breakdown",
        action="store_const",
        const="breakdown",
        dest="selection",
        help="where the time goes on a CPU, and what limits it",
    )
    select.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="one case; may be repeated"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"beside {OURS!r} only this one; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every number, as JSON")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="bars per case and a roofline, as PNG")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="flag ratios to peers that fell by more than 10 %% since",
    )
    parser.add_argument(
        "--until", type=float, default=float("inf"), metavar="SECONDS", help="start no case after so many"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu; by default a GPU where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the random tensors")
    parser.add_argument("--list", action="store_true", help="the names of selections, cases and peers")
    return parser


def _selection(args: argparse.Namespace, device: torch.device) -> Selection:
    if args.case:
        return Selection(tuple(registry.case(name) for name in args.case), _SECONDS)
    return SELECTIONS[args.selection or ("gpu" if device.type == "cuda" else "quick")]


def _peers(args: argparse.Namespace) -> tuple[str, ...]:
    """Ours first, which the ratios need; none for the default."""
    if args.peer:
        return tuple(dict.fromkeys([OURS, *(registry.known(name, PEERS, "peer") for name in args.peer)]))
    return STRATEGIES if args.selection == "dispatch" else ()


def _earlier(path: Path) -> dict[str, Any]:
    results = read_json(path)
    if not isinstance(results, dict) or (results.get("format"), results.get("format_version")) != (
        FORMAT,
        FORMAT_VERSION,
    ):
        raise CheckpointError(f"{path}: not the results of this benchmark, format version {FORMAT_VERSION}")
    return results


if __name__ == "__main__":
    raise SystemExit(main())
