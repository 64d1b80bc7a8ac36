"""The folders that merges are written to: free or the beginning of the same merge, writable, with room."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingle import tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError, free_space
from mingle.io.leftovers import foreign
from mingle.io.manifest import MANIFEST, read_manifest
from mingle.methods import MergeMethod
from mingle.runs import inputs, room
from mingle.runs.course import COURSE
from mingle.runs.merge import MergePlan


def check(plan: MergePlan, method: MergeMethod) -> None:
    """Refuse folders that hold anything but the beginning of this very merge, and a disk without room for it.

    Args:
        plan: of the merge.
        method: fitted to its base model or to its skeleton.

    Raises:
        CheckpointError: the message names the folder and the reason.
    """
    if not plan.folders:
        return
    size, needed, least, keep = room.of_method(method, plan.base), 0, 0, plan.config.keep
    for folder, order in zip(plan.folders, plan.orders, strict=True):
        merged = _check_folder(folder, plan, order) if folder.exists() else 0
        if merged < len(order):
            base = 0 if merged else size.base
            needed += base + size.saved_each(len(order) - merged, merged, keep or _keep(folder))
            least += base + size.saved_each(len(order) - merged, merged, 1)
    try:
        free_space(plan.folders[0], needed)
    except CheckpointError as error:
        if least < needed:
            error.add_note(f"keep: 1, which keeps only the newest generation of the merge, needs {least}")
        raise


def _keep(folder: Path) -> int | None:
    """How many generations the folder keeps so far; None for all."""
    return read_manifest(folder).get("keep") if (folder / MANIFEST).exists() else None


def _check_folder(folder: Path, plan: MergePlan, order: list[str]) -> int:
    """How many tasks of this very merge the folder holds."""
    if not (folder / MANIFEST).exists():
        if (stranger := foreign(folder)) is not None:
            raise CheckpointError(
                f"{folder}: not empty, and not a merge that could be resumed: {stranger} is in it; name a "
                "new folder"
            )
        return 0
    manifest = merger_folder.load(folder).manifest
    noted = manifest["metadata"].pop(inputs.INPUTS, {})  # compared one by one
    manifest["metadata"].pop(COURSE, None)  # of what was merged, not of what is asked for
    revisions = {"revisions": plan.revisions}  # compared when they were read
    found = _facts(manifest, manifest["metadata"] | revisions)
    wanted = _facts(
        {"method": plan.config.method, "task_type": plan.task.name, "options": plan.options}, plan.origin()
    )
    found["vocabulary"], wanted["vocabulary"] = manifest.get("vocabulary", "same"), plan.config.vocabulary
    found["dtype"], wanted["dtype"] = manifest["dtype"], plan.config.dtype
    differing = [
        f"{key}: {found.get(key)!r} there, {value!r} now"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    merged = [task["name"] for task in manifest["tasks"]]
    if merged != order[: len(merged)]:
        differing.append(f"tasks: {', '.join(merged)} there, the order is now {', '.join(order)}")
    elif removed := [task["name"] for task in manifest.get("removed", [])]:
        differing.append(f"tasks: {', '.join(removed)} left, and something of what they were stays")
    else:
        differing += inputs.changed(noted, merged, plan.experts, plan.config.eval.suite)
    if differing:
        reasons = "; ".join(differing)
        raise CheckpointError(
            f"{folder}: holds another merge, which this one cannot resume; {reasons}; name another folder, "
            "or merge as before"
        )
    return len(merged)


def _facts(merge: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that must be the same for a merge to go on; JSON has lists where options have tuples."""
    plain = {
        f"option {key}": tuple(value) if isinstance(value, list) else value
        for key, value in merge["options"].items()
    }
    task_type = tasks.get(merge["task_type"]).name  # which may be noted by an earlier name
    return {"method": merge["method"], "task type": task_type, "metadata": metadata, **plain}
