"""What happens to a merged folder after its merge: tasks leave, and earlier generations come back or go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mingle.io import generations, merger_folder, rollback
from mingle.io.files import free_space, writable
from mingle.io.manifest import read_manifest
from mingle.merging.evaluate import Result
from mingle.merging.merger import Merger
from mingle.options import OptionError
from mingle.runs import course, room
from mingle.runs.merge import suite_of


@dataclass(frozen=True)
class Generation:
    """One state that a merged folder can return to.

    Attributes:
        number: of it.
        parent: the number of the one that it was made from; None for the first.
        current: whether it is the one in use.
        came, left: the tasks that it has and its parent has not, and the other way round.  Where the parent
            is not kept any more, all of its tasks came.
        tasks: how many it has.
        acc: mean accuracy over all of them, in per cent; None where one was not measured.
        own_bytes: of the tensors that no other generation needs.
    """

    number: int
    parent: int | None
    current: bool
    came: list[str]
    left: list[str]
    tasks: int
    acc: float | None
    own_bytes: int


def remove(
    folder: Path, names: Sequence[str], overrides: Mapping[str, Any]
) -> tuple[Result, dict[str, list[str]]]:
    """Take tasks out of a merged model, evaluate where there is a suite and anything has changed, and save.

    Args:
        folder: the folder that a merge wrote.
        names: the tasks, each once.
        overrides: as for `mingle.runs.merge.add`.

    Returns:
        The result, and by task what stays of it, see `mingle.Merger.remove`.

    Raises:
        OptionError: a name given twice.
        ValueError: a task that is not merged, or that the method cannot take out.  Nothing was changed.
    """
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise OptionError(f"task {twice[0]!r} is named twice")
    writable(folder)
    with merger_folder.writing(folder, new=False):
        merger = Merger.from_pretrained(folder)
        assert merger.base_folder is not None  # without a base in the folder, it would not have been opened
        size = room.of_method(merger.method, merger.base_folder)
        free_space(folder, size.saved_each(1, len(merger.merged)))
        stays = {}
        places = {name: place for place, name in enumerate(merger.task_names)}
        # the newest first, so that nothing is said to stay in what leaves too
        for name in sorted(names, key=lambda name: places.get(name, -1), reverse=True):
            try:
                stays[name] = merger.remove(name)
                course.forget(merger.metadata, name)
            except ValueError as error:
                if earlier := _before(folder, name):
                    way = f"`mingle rollback {folder} --to {earlier}`, and add again what came after it"
                    error.add_note(f"generation {earlier} does not have it: {way}")
                raise
        suite = suite_of(merger, folder, overrides, merger.task_names)
        if suite is not None and merger.merged and None in merger.matrix[-1]:
            merger.evaluate(suite, merger.metadata["batch_size"])
        merger.save_pretrained(folder)
        return merger.result(), {name: stays[name] for name in names}


def _before(folder: Path, name: str) -> int | None:
    """The newest generation in which a merged task is not, and that has any; None where there is none."""
    manifest = read_manifest(folder)
    if name not in [task["name"] for task in manifest["tasks"]]:
        return None
    found = [
        each["generation"]
        for each in generations.all_of(folder, manifest)
        if each["tasks"] and name not in [task["name"] for task in each["tasks"]]
    ]
    return max(found, default=None)


def history(folder: Path) -> list[Generation]:
    """The generations of a merged folder that are kept, oldest first; early versions kept none."""
    manifest = read_manifest(folder)
    if "history" not in manifest:
        return []
    kept = generations.all_of(folder, manifest)
    names = {each["generation"]: [task["name"] for task in each["tasks"]] for each in kept}
    listed = []
    for each, own_bytes in zip(kept, generations.sizes(kept), strict=True):
        own, before = names[each["generation"]], names.get(each["parent"], [])
        result = Result(own, each["matrix"], each.get("unknown", []))
        listed.append(
            Generation(
                each["generation"],
                each["parent"],
                each["generation"] == manifest["generation"],
                [name for name in own if name not in before],
                [name for name in before if name not in own],
                len(own),
                None if result.acc != result.acc else result.acc,
                own_bytes,
            )
        )
    return listed


def return_to(folder: Path, number: int) -> list[str]:
    """Return to an earlier generation; gives the names of its tasks.

    Raises:
        CheckpointError: see `mingle.io.rollback.rollback`.
    """
    writable(folder)
    rollback.rollback(folder, number)
    return [task["name"] for task in read_manifest(folder)["tasks"]]


def tidy(folder: Path, keep: int = 1, *, only_tell: bool = False) -> int:
    """Forget old generations; returns the bytes that this frees, see `mingle.io.rollback.tidy`."""
    if not only_tell:
        writable(folder)
    return rollback.tidy(folder, keep, only_tell=only_tell)
