"""What a person reads of a finished run: a table, a CSV file and plots, made from plain data.

`results` is ``results.json``: under ``methods`` and the method's name, for each order of arrival, ``acc``
(per cent), ``bwt`` (points), ``seconds``, ``order`` (task names) and ``matrix`` (row i: accuracies after
merging task i); and, but for files of earlier versions, ``acc_unknown`` and ``unknown``, the same where the
task has to be found too.  A missing number is None or NaN.

`traces` is ``traces.json``: under the name of a method that adapts, for its first order, ``order``,
``layers`` (by depth) and per task ``loss`` [steps], ``interference`` and ``strength`` {layer: [steps]} and
``gates`` [layers × experts].
"""

from __future__ import annotations

from mingle.runs.report import comparison, sweeps
from mingle.runs.report.files import read
from mingle.runs.report.numbers import REFERENCES
from mingle.runs.report.plots import write_plots
from mingle.runs.report.tables import markdown_table, table, write_csv

__all__ = [
    "REFERENCES",
    "comparison",
    "markdown_table",
    "read",
    "sweeps",
    "table",
    "write_csv",
    "write_plots",
]
