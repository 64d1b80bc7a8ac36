"""How the studies of single layers run: every case measured on the CPU, shown, and written where asked."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mingle.bench import command, table
from mingle.bench.record import CaseResult, envelope
from mingle.io.files import write_json


def run(
    arguments: Sequence[str] | None,
    description: str,
    name: str,
    cases: Sequence[Any],
    measure: Callable[..., CaseResult],
) -> int:
    """Measure the cases, show what was found and write it; returns the exit status.

    Args:
        arguments: of the command line; None for those of this process.
        description: of the study, for `--help`.
        name: of the benchmark, in its results.
        cases: what is measured.
        measure: called with a case and a `seed`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every number, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the random tensors")
    args = parser.parse_args(arguments)
    command.show_progress()
    began = time.monotonic()
    found = [measure(case, seed=args.seed) for case in cases]
    results = envelope(name, torch.device("cpu"), args.seed, found, (), began)
    if args.out:
        write_json(args.out, results)
    table.write(results)
    return command.status(results)
