"""The kernel benchmark; installed as ``mingle.bench``, run as ``python bench/run.py`` or ``mingle bench``.

`registry` names the cases, `inputs` makes their tensors, `peers` builds what is compared, `check` refuses
wrong answers, `measure` times, `floor` says what the hardware allows, `judge` holds results against targets
and earlier ones, `machine` says where they come from, `table` and `plot` show them, and `run` is the command
line.
"""
