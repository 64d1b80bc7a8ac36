"""What a person reads of a finished run: a table, a CSV file and plots, made of plain data.

`results` is ``results.json``: under ``methods`` and the method's name, per order of arrival, ``acc`` and
``bwt`` (per cent), ``seconds``, ``order`` (task names) and ``matrix`` (row i: accuracies after merging task
i).  A missing number is None or NaN.

`traces` is ``traces.json``: under the name of a method that adapts, of its first order, ``order``, ``layers``
(by depth) and per task ``loss`` [steps], ``interference`` and ``strength`` {layer: [steps]} and ``gates``
[layers × experts].
"""

from __future__ import annotations

from mingle.runs.report import comparison, sweeps
from mingle.runs.report.numbers import REFERENCES
from mingle.runs.report.plots import write_plots
from mingle.runs.report.tables import markdown_table, table, write_csv

__all__ = ["REFERENCES", "comparison", "markdown_table", "sweeps", "table", "write_csv", "write_plots"]
