"""The folders that merges are written to: free or the beginning of the same merge, writable, with room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle import tasks
from mingle.io import leftovers, merger_folder
from mingle.io.files import CheckpointError, free_space
from mingle.io.leftovers import foreign
from mingle.io.manifest import MANIFEST, read_manifest
from mingle.methods import MergeMethod
from mingle.runs import inputs, room
from mingle.runs.course import COURSE
from mingle.runs.merge import MergePlan

#: the bytes that what is left of a merge needs on the disk, by its folder, how many tasks that holds, and how
#: many generations are kept, None for all
Needs = Callable[[Path, int, int | None], int]


def check(plan: MergePlan) -> list[int]:
    """Refuse folders that hold anything but the beginning of this very merge.

    Returns:
        How many of its tasks each of the plan's folders holds.

    Raises:
        CheckpointError: the message names the folder and the reason.
    """
    each = zip(plan.folders, plan.orders, strict=False)  # a plan that is only to be checked has none
    return [_check_folder(folder, plan, order) if folder.exists() else 0 for folder, order in each]


def check_room(plan: MergePlan, merged: Sequence[int], needs: Needs) -> None:
    """Refuse a disk without room for what is left of a merge.

    Args:
        plan: of the merge.
        merged: what `check` returned.
        needs: the bytes that are to be free for what is left in a folder.

    Raises:
        CheckpointError: the message names the folder and says how much is missing.
    """
    needed = least = 0
    for folder, order, there in zip(plan.folders, plan.orders, merged, strict=False):
        if there < len(order):
            needed += needs(folder, there, plan.config.keep or _keep(folder))
            least += needs(folder, there, 1)
    try:
        if plan.folders:
            free_space(plan.folders[0], needed)
    except CheckpointError as error:
        if least < needed:
            error.add_note(f"keep: 1, which keeps only the newest generation of the merge, needs {least}")
        raise


def in_memory(method: MergeMethod, base: Path, tasks: int) -> Needs:
    """What a merge of so many tasks needs, whose method was fitted to the base in that folder."""
    size = room.of_method(method, base)

    def needs(folder: Path, merged: int, keep: int | None) -> int:
        return (0 if merged else size.base) + size.saved_each(tasks - merged, merged, keep)

    return needs


def in_files(fullest: Callable[[int | None], int], step: Callable[[int], int]) -> Needs:
    """What a merge needs that goes tensor by tensor.

    What its folder holds counts, such as finished parts of a step that was interrupted.

    Args:
        fullest: the bytes of its folder at the fullest, by how many generations are kept.
        step: those that a step writes before anything can go, by how many tasks are merged before it.
    """

    def needs(folder: Path, merged: int, keep: int | None) -> int:
        # all but the page, the card and the like beside the manifest, which no forecast counts
        held = (path for path in folder.rglob("*") if path.parent != folder or path.suffix == ".safetensors")
        left = fullest(keep) - leftovers.size(path for path in held if path.is_file())
        return max(0, left, step(merged) - leftovers.finished_bytes(folder) if merged else 0)

    return needs


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
