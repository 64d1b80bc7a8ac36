"""The tables of the paper, measured: planned whole, run cell by cell by any number of processes, and gathered
from finished cells.

tables    which settings of which methods are compared
plan      a request, found to be possible: the table's cells
cells     one method on one suite in one order
run       all cells, shared between processes
summary   what the finished cells say together, beside what `paper` reports
"""

from mingle.runs.reproduce.plan import EVALUATE, Request, TablePlan, plan
from mingle.runs.reproduce.run import run

__all__ = ["EVALUATE", "Request", "TablePlan", "plan", "run"]
