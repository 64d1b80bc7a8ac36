"""Task types: how a batch becomes logits, and what counts as right.

The only code that knows about modalities is in this package.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from torch import nn

from mingle.options import nearest, shown
from mingle.tasks.base import TaskType
from mingle.tasks.data import TaskData
from mingle.tasks.kinds import kind_of

#: the group of entry points by which packages offer task types of their own
ENTRY_POINTS = "mingle.task_types"
#: other names of task types, under which merged models may be saved
_ALIASES = {"t5": "seq2seq"}
_registered: dict[str, TaskType] = {}


def register(task_type: TaskType | type[TaskType]) -> None:
    """Make a task type known under its name, for configurations and for merged models that note it.

    Args:
        task_type: an object, or a class that needs no arguments; registering the same name again replaces it.

    Raises:
        TypeError: not a `TaskType`.
        ValueError: the name of one that mingle brings along.
    """
    task = task_type() if isinstance(task_type, type) else task_type
    if not isinstance(task, TaskType):
        raise TypeError(f"{task!r}: expected a mingle.tasks.TaskType")
    if task.name in _own() or task.name in _ALIASES:
        raise ValueError(f"task type {task.name!r}: mingle has one of that name")
    _registered[task.name] = task


def get(name: str) -> TaskType:
    """The task type of that name: one of mingle's, a registered one, or one that a package offers.

    Raises:
        ValueError: an unknown name.
    """
    known = _own() | _registered
    name = _ALIASES.get(name, name)
    if name not in known:
        offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name in offered:
            return _offered(offered[name])
        expected = ", ".join((*known, *offered))
        raise ValueError(
            f"unknown task type {shown(name)}{nearest(name, known)}; expected one of {expected}, or one of "
            "your own: give it as an object, or see mingle.tasks.register"
        )
    return known[name]


def _offered(point: EntryPoint) -> TaskType:
    """The task type of a package, registered."""
    package = "" if point.dist is None else f" of {point.dist.name}"
    try:
        register(point.load())
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"entry point {point.name!r}{package}: {error}") from error
    if point.name not in _registered:
        raise ValueError(f"entry point {point.name!r}{package}: {point.value} has another name")
    return _registered[point.name]


def of(model: nn.Module | str | Path) -> TaskType:
    """The task type of a base model, a module or a local folder, by its configuration and its head.

    Raises:
        CheckpointError: a folder without a readable configuration, or with one of an unknown kind of model.
        ValueError: a module of an unknown kind.
    """
    return get(kind_of(model))


def _own() -> dict[str, TaskType]:
    from mingle.tasks.causal_lm import CausalLmTask
    from mingle.tasks.classification import ImageClassificationTask, TextClassificationTask
    from mingle.tasks.clip import ClipTask
    from mingle.tasks.sentence_encoder import SentenceEncoderTask
    from mingle.tasks.seq2seq import Seq2SeqTask

    kinds = (
        *(ClipTask(), Seq2SeqTask(), CausalLmTask()),
        *(ImageClassificationTask(), TextClassificationTask(), SentenceEncoderTask()),
    )
    return {task.name: task for task in kinds}


__all__ = ["TaskData", "TaskType", "get", "of", "register"]
