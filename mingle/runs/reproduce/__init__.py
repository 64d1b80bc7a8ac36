"""The tables of the paper, measured cell by cell.

One module for each stage:

    tables    which settings of which methods are compared
    request   what is asked for, and its plan: a table's cells
    cells     one method on one suite in one order
    work      all cells, run by any number of processes
    summary   the finished cells together, beside the figures in `paper`
"""

from mingle.runs.reproduce.request import EVALUATE, Request, TablePlan, plan
from mingle.runs.reproduce.work import run

__all__ = ["EVALUATE", "Request", "TablePlan", "plan", "run"]
