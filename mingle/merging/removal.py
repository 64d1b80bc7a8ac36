"""A task that leaves a merged model, and what it leaves behind."""

from __future__ import annotations

from typing import Any

from mingle.merging.merged_task import RemovedTask
from mingle.merging.state import MergeState

Rows = list[list[float | None]]


def remove(merge: MergeState, name: str) -> list[str]:
    """Take a task out of a merge, see `mingle.Merger.remove`."""
    place = merge._place(name)
    before = merge.model, merge.method
    stays: list[str] = []
    if len(merge.merged) == 1:
        merge._begin(type(merge.method))
    else:
        saved = [merge.method.task_tensors(i) for i in range(len(merge.merged))]
        try:
            left = merge.method.without(place, saved)
        except ValueError as error:
            raise ValueError(f"task {name!r} cannot be removed: {error}") from None
        stays = left.stays
        try:
            merge._begin(type(merge.method))
            merge.method.restore(left.tasks, left.state)
        except BaseException:
            merge.model, merge.method = before
            raise
    newest = place == len(merge.merged) - 1
    del merge.merged[place]
    for rows in (merge.matrix, merge.unknown):
        _forget(rows, place, measured=newest and not stays)
    merge.answers = {}  # some may have been of the task
    if merge.merged:
        merge._put_head(-1)
    if stays:
        merge.removed.append(RemovedTask(name, stays))
    if not merge.merged:
        merge.removed = []  # the model is the base again
    _forget_origin(merge.metadata, name)
    return stays


def _forget(rows: Rows, place: int, *, measured: bool) -> None:
    """Take a task out of accuracies; those of the model as it is now hold only if `measured` without it."""
    del rows[place]
    for row in rows[place:]:
        del row[place]
    if rows and not measured:
        rows[-1] = [None] * len(rows)


def _forget_origin(metadata: dict[str, Any], name: str) -> None:
    """Take a task out of what runs note of their tasks: inputs by name, and a list of steps."""
    inputs, steps = metadata.get("inputs"), metadata.get("steps")
    if isinstance(inputs, dict):
        metadata["inputs"] = {task: noted for task, noted in inputs.items() if task != name}
    if isinstance(steps, list):
        metadata["steps"] = [
            step for step in steps if not (isinstance(step, dict) and step.get("task") == name)
        ]
