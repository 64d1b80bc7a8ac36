"""How long each task of a merge took, in a file beside the merged model.

It is not in the manifest: that is the same, bit for bit, whenever and wherever the merge is made.
"""

from __future__ import annotations

from pathlib import Path

from mingle import ranks
from mingle.io.files import read_json, write_json
from mingle.io.schema import check
from mingle.runs.loop import MergeStep

TIMINGS = "timings.json"


def note(folder: Path, step: MergeStep) -> None:
    """Note the seconds of a task, in the first process of a group; those of earlier ones stay."""
    if ranks.rank() == 0:
        write_json(folder / TIMINGS, {"seconds": read(folder) | {step.task: step.merge}}, sort_keys=False)


def read(folder: Path) -> dict[str, float]:
    """Name of a task → seconds of merging it; nothing where there is no such file.

    Raises:
        CheckpointError: a broken file.
    """
    path = folder / TIMINGS
    if not path.is_file():
        return {}
    found = read_json(path)
    check(found, {"seconds": {str: float}}, path)
    seconds: dict[str, float] = found["seconds"]
    return seconds
