"""MINGLE under several settings, each in several task orders; writes ACC and BWT of every row as JSON.

``tuning`` is how the suite's settings were chosen: learning rates and ranks on the tuning tasks, which are in no suite, everything else
as published.  The best ACC decides; among settings within half a point of it, the smaller rank, then the smaller learning rate.

``ablation`` is the paper's: constant gates, all gates trainable, old gates frozen, hard null space, adaptive relaxation; on glyphs8.

    python bench/glyphs/sweep.py tuning bench/results/cpu/glyphs-tuning.json
    python bench/glyphs/sweep.py ablation bench/results/cpu/glyphs-ablation-strict.json --orders 3
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from mingle.experiment import Experiment, run
from mingle.files import write_json
from mingle.storage import versions
from mingle.suites.protocol import PROTOCOLS

TUNING = {f"lr {lr:g}, rank {rank}": {"lr": lr, "rank": rank} for lr, rank in itertools.product((5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (16, 32))}
ABLATION: dict[str, dict[str, Any]] = {
    "static coefficients": {"gates": "static"},
    "all gates trainable": {"gates": "all", "constraint": "none"},
    "frozen old gates": {"constraint": "none"},
    "hard null space": {"constraint": "hard"},
    "adaptive relaxation": {},
}
#: sweep → (suite, rows)
SWEEPS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {"tuning": ("glyphs-tuning", TUNING), "ablation": ("glyphs8", ABLATION)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--protocol", default="strict", choices=PROTOCOLS)
    parser.add_argument("--orders", type=int, default=2)
    args = parser.parse_args()
    suite, settings = SWEEPS[args.sweep]
    rows = []
    for label, options in settings.items():
        experiment = Experiment(suite, args.protocol, ("mingle",), args.orders, options=tuple(options.items()))
        with tempfile.TemporaryDirectory() as folder:
            measured = run(experiment, Path(folder))["methods"]["mingle"]
        rows.append({"settings": label, **options, "acc": measured["acc"], "bwt": measured["bwt"]})
        print(f"{label:22} ACC {statistics.fmean(measured['acc']):5.1f}  BWT {statistics.fmean(measured['bwt']):+5.1f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"suite": suite, "protocol": args.protocol, "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
