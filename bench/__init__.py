"""The benchmarks; installed as ``mingle.bench``.  Four are run from a command line:

    run.py        the kernels, ``mingle bench``: `gated_experts` holds cases, peers, float64 oracle, floors and breakdown
    decompose.py  making a task's experts: `decomposition`
    e2e.py        whole merges, and how their cost grows: `merges`
    nufilt.py     NUFILT's training steps

Cases and peers are data.  All share `measure` (the one loop that times, in turns, what was found right), `memory`, `load` (whether
others used the CPUs), `results` (the one form of a result), `judge` (targets and regressions), `table` and `plot` (which show any
result) and `command`.  ``tune.py`` searches tile sizes, ``gpu.sh`` runs all that needs a GPU, ``results/`` holds what was measured.
"""
