"""How the glyph suites' settings of the methods that train were chosen, on tasks that are in no suite.

Learning rates depend on the size of a model, and the published ones are for much larger models; so does how
much of a layer's width the ranks take.  `mingle.runs.tuning` has the rule.  Started twice, two processes
share the work.

    python examples/glyph_models/tuning.py bench/results/cpu/glyphs-tuning.json --work runs/tuning
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from mingle.io.files import write_json
from mingle.runs.tuning import Tuning

#: method → option → values
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mingle": {"rank": (8, 16, 32), "gamma": (0.0, 0.1, 0.3, 1.0), "lr": (1e-3, 2e-3, 4e-3)},
    "adamerging": {"lr": (1e-4, 1e-3, 1e-2)},
    "wemoe": {"lr": (1e-4, 1e-3, 1e-2)},
    "nufilt": {"r_p": (32, 64, 128), "lr": (1e-3, 1e-2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/tuning"), help="folder of finished runs")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)  # better now than after an hour
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    write_json(args.out, Tuning("glyphs-tuning", args.work).run(GRIDS))


if __name__ == "__main__":
    main()
