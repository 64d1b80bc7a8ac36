"""The tables of the paper, measured: planned whole, run cell by cell by any number of processes, and gathered
from finished cells.

tables    which settings of which methods are compared
request   what is asked for, and the plan of it: a table's cells
cells     one method on one suite in one order
work      all cells, run by any number of processes
summary   what the finished cells say together, beside what `paper` reports
"""

from mingle.runs.reproduce.request import EVALUATE, Request, TablePlan, plan
from mingle.runs.reproduce.work import run

__all__ = ["EVALUATE", "Request", "TablePlan", "plan", "run"]
