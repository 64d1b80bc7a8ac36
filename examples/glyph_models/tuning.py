"""How the glyph suites' settings were chosen, on tasks that are in no suite.

Learning rates depend on the size of a model, and the published ones are for much larger models; so does how
much of a layer's width the ranks take.  `mingle.runs.tuning` has the rule.  Started twice, two processes
share the work.

    python examples/glyph_models/tuning.py bench/results/cpu/glyphs-tuning.json --work runs/tuning
"""

from __future__ import annotations

from pathlib import Path

from mingle.runs.tuning import WITHOUT_TRAINING, Grid, as_script

#: method → option → values
GRIDS: dict[str, Grid] = {
    **WITHOUT_TRAINING,
    "mingle": {"rank": (8, 16, 32), "gamma": (0.0, 0.1, 0.3, 1.0), "lr": (1e-3, 2e-3, 4e-3)},
    "adamerging": {"lr": (1e-4, 1e-3, 1e-2)},
    "wemoe": {"lr": (1e-4, 1e-3, 1e-2)},
    "nufilt": {"r_p": (32, 64, 128), "lr": (1e-3, 1e-2)},
}


if __name__ == "__main__":
    as_script(__doc__.splitlines()[0], "glyphs-tuning", Path("runs/tuning"), GRIDS)
