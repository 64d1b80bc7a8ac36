"""The gated sum of experts against every other way to compute it, run as ``python bench/run.py``.

`cases` names the problems, `inputs` makes their tensors, `peers` what is compared (`ours`, `handmade`, `packages`), `check` is the
float64 oracle, `comparison` measures a case, `floor` says what the hardware allows, `breakdown` where the time goes on a CPU.
"""
