"""The benchmarks; installed as ``mingle.bench``.

    run.py        the kernels (also ``mingle bench``); `gated_experts` holds cases, peers and the oracle
    decompose.py  making a task's experts; `decomposition`
    e2e.py        whole merges; `merges`
    gpu.sh        all that needs a GPU; results/: what was measured

All share `measure` (the one loop that times, in turns, what was found right), `machine` (memory, stages,
other processes), `record` (the one form of a result), `judge`, `table`, `plot` and `command`.
"""
