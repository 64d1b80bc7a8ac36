"""What making a task's experts costs, run as ``python bench/decompose.py``.

`cases` names the layers and makes their task vectors, `peers` decompose a matrix, `pipelines` go from Δ and earlier experts to new
ones, `check` compares with float64 LAPACK, `comparison` measures one shape and adds shapes up to a task.
"""
