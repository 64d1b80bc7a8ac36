"""How the glyph suites' settings of MINGLE were chosen: learning rates and ranks on the tuning tasks, which are in no suite.

Everything else is as published.  The best ACC decides; among settings within half a point of it, the smaller rank, then the smaller
learning rate.  Writes ACC and BWT of every row as JSON.

    python bench/glyphs/tuning.py bench/results/cpu/glyphs-tuning.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

from mingle.experiment import Experiment, run
from mingle.files import write_json
from mingle.storage import versions
from mingle.suites.protocol import PROTOCOLS

SETTINGS = {f"lr {lr:g}, rank {rank}": {"lr": lr, "rank": rank} for lr, rank in itertools.product((5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (16, 32))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--protocol", default="strict", choices=PROTOCOLS)
    parser.add_argument("--orders", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for label, options in SETTINGS.items():
        experiment = Experiment("glyphs-tuning", args.protocol, ("mingle",), args.orders, options=tuple(options.items()))
        with tempfile.TemporaryDirectory() as folder:
            measured = run(experiment, Path(folder))["methods"]["mingle"]
        rows.append({"settings": label, **options, "acc": measured["acc"], "bwt": measured["bwt"]})
        print(f"{label:22} ACC {statistics.fmean(measured['acc']):5.1f}  BWT {statistics.fmean(measured['bwt']):+5.1f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"suite": "glyphs-tuning", "protocol": args.protocol, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
