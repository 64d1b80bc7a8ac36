"""The decomposition benchmark: what making a task's experts costs; run as ``python bench/decompose.py``.

`cases` names the layers and makes their task vectors, `peers` and `pipelines` hold what is compared, `check`
refuses wrong answers, `measure` times, `predict` counts launches, bytes and operations on a GPU, `judge` adds
layers up and holds them against targets, `show` and `plots` present it all.
"""
