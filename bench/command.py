"""What the command lines share: options, progress on stderr, and what is done with results."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from mingle.bench import table
from mingle.bench.measure import OURS, log
from mingle.bench.record import Results
from mingle.io.files import file_path, made, write_json
from mingle.text import visible


def parser(description: str) -> argparse.ArgumentParser:
    """With --gpu, --out FOLDER, --seed and --quick."""
    found = argparse.ArgumentParser(description=description)
    add = found.add_argument
    add("--gpu", action="store_true", help="on the current CUDA device")
    add("--out", type=file_path, metavar="FOLDER", help="every number as JSON, and plots")
    add("--seed", type=int, default=0, help="of everything random")
    add("--quick", action="store_true", help="a small part of it: does it work at all?")
    return found


def begin(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the device beside them; the folder is made now rather than after ten minutes."""
    args = parser.parse_args(arguments)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no CUDA device")
    if args.out:
        try:
            made(args.out)
        except ValueError as error:
            parser.error(visible(str(error)))
    args.device = torch.device("cuda" if args.gpu else "cpu")
    show_progress()
    return args


def show_progress(*, quiet: bool = False) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.ERROR if quiet else logging.INFO)


def finish(results: Results, folder: Path | None, name: str, *, peers_too: bool = False) -> int:
    """Write NAME.json and its pictures into `folder`, show the results, and return their `status`."""
    if folder:
        write_json(folder / f"{name}.json", results)
        from mingle.bench import plot  # matplotlib only where it is used

        plot.write_plots(results, folder, name)
    table.write(results)
    return status(results, peers_too)


def status(results: Results, peers_too: bool = False) -> int:
    """1 where something of ours was wrong or failed, with `peers_too` where anything was, else 0."""
    rows = (row for case in results["cases"] for row in case["rows"] if row["status"] in ("wrong", "failed"))
    return int(any(peers_too or row["name"].startswith(OURS) for row in rows))
