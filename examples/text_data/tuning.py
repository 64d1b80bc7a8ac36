"""How the text suites' settings were chosen, on tasks that are in no suite.

The published settings are for much larger models.  `mingle.runs.tuning` has the rule.  Started twice, two
processes share the work.

    python examples/text_data/tuning.py bench/results/cpu/texts-tuning.json --work runs/text_tuning
"""

from __future__ import annotations

from pathlib import Path

from mingle.runs.tuning import WITHOUT_TRAINING, Grid, as_script

#: method → option → values
GRIDS: dict[str, Grid] = {
    **WITHOUT_TRAINING,
    # half the published rank, for a model half as wide
    "mingle": {"rank": (32,), "gamma": (0.1, 0.3, 1.0), "lr": (5e-4, 1e-3, 2e-3)},
    "adamerging": {"lr": (1e-4, 1e-3, 1e-2)},
    "wemoe": {"lr": (1e-4, 1e-3, 1e-2)},
    "nufilt": {"r_p": (64, 128, 256), "lr": (1e-3, 1e-2)},
}


if __name__ == "__main__":
    as_script(__doc__.splitlines()[0], "texts-tuning", Path("runs/text_tuning"), GRIDS)
