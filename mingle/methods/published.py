"""The settings behind the published figures, by method, task type and number of tasks.

They are those of arXiv 2505.11883 and of its code; of methods that it does not compare with, those of their
own papers.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mingle import methods

_ADAPTATION: dict[str, dict[str, Any]] = {
    "clip": {"steps": 50, "lr": 1e-4, "batch_size": 16},
    "seq2seq": {"steps": 50, "lr": 1e-3, "batch_size": 8},
}
_MINGLE = {
    "rank": 64,
    "k": 3,
    "gamma": 1.0,
    "beta": 0.99,
    "temperature": 2.0,
    "gates": "newest",
    "constraint": "relaxed",
}


def published(method: str, task_type: str, tasks: int) -> dict[str, Any]:
    """The published settings of a method's options; empty for a method or a task type without any.

    Args:
        method: a name in `mingle.methods.METHODS`.
        task_type: ``"clip"`` or ``"seq2seq"``.
        tasks: how many will be merged.  λ of task arithmetic and TIES is 0.3 for 8 tasks and 0.1 for 11, 14
            and 20.
    """
    if method not in methods.METHODS or task_type not in _ADAPTATION:
        return {}
    known = {field.name for field in fields(methods.METHODS[method].Options)}
    return {name: value for name, value in _settings(method, task_type, tasks).items() if name in known}


def _settings(method: str, task_type: str, tasks: int) -> dict[str, Any]:
    scaling = 0.3 if tasks <= 8 else 0.1
    adaptation = _ADAPTATION[task_type]
    # In the published configuration for Flan-T5, minimising the entropy takes twice as many steps.
    entropy = {"init": 0.3} | adaptation | ({"steps": 100} if task_type == "seq2seq" else {})
    table: dict[str, dict[str, Any]] = {
        "task-arithmetic": {"scaling": scaling},
        "ties": {"scaling": scaling, "density": 0.2},
        "magmax": {"scaling": 0.5},
        "consensus-ta": {"scaling": 0.1, "threshold": 0.2, "min_masks": 2},
        "opcm": {"alpha": 0.5},
        "tsv-m": {"scaling": 1.0},
        "wudi": {"solver": "adam", "lr": 1e-5, "steps": 300},
        "adamerging": entropy,
        "wemoe": {"rank": 64, "later_rank": 16}
        | entropy
        | ({"rank": 32, "later_rank": 32} if task_type == "seq2seq" else {}),
        "nufilt": {"r_p": 128, "r_v": 8, "r_l": 64, "steps": 50, "lr": 1e-3},
        "mingle": _MINGLE | adaptation,
        "mingle-light": _MINGLE | adaptation,
        "mingle-routed": _MINGLE | adaptation,
        "mingle-seq": _MINGLE | adaptation | {"steps": 500, "constraint": "hard"},
    }
    return table.get(method, {})
