"""The course of a merge as little plain data, which its page shows and a merged model's metadata keeps.

    {"tasks": {name: {"steps": n, "loss": [P], "interference": {block: [P]}, "strength": {block: [P]}}},
     "gates": {"tasks": [T], "experts": [E], "layers": [L], "mean": [T × E], "own": [L × E]}}

The series are means over the layers of a block, at P steps evenly spaced from the first to the last; of a
task that was not adapted there is nothing.  Of the gates after the last merge, ``mean`` is over layers, of
every expert on the samples of every task; ``own`` is how far an expert's gate on the samples of its own task
is above the mean of all others on them, None for a single expert.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError
from mingle.io.schema import Absent, check
from mingle.options import shown
from mingle.runs.loop import MergeStep

#: the key in the metadata
COURSE = "course"
_SERIES = [(float, None)]
_BLOCKS = {str: _SERIES}
FORM = {
    "tasks": {
        str: {
            "steps": Absent(int),
            "loss": Absent(_SERIES),
            "interference": Absent(_BLOCKS),
            "strength": Absent(_BLOCKS),
        }
    },
    "gates": Absent({"tasks": [str], "experts": [str], "layers": [str], "mean": [_SERIES], "own": [_SERIES]}),
}
#: how many points of a series are kept, and with how many digits
_POINTS, _DIGITS = 24, 4


def check_course(course: Any, file: Path) -> None:
    """Raise `CheckpointError`, which names file and key, for what is not the course of a merge."""
    check({COURSE: course}, {COURSE: FORM}, file)
    for name, task in course["tasks"].items():
        series = [task.get("loss", [])]
        series += [values for key in ("interference", "strength") for values in task.get(key, {}).values()]
        if len({len(values) for values in series}) > 1:
            raise CheckpointError(f"{file}: {COURSE}.tasks.{shown(name)}: expected series of one length")
    if (gates := course.get("gates")) is not None:
        experts = len(gates["experts"])
        for key, rows in (("mean", gates["tasks"]), ("own", gates["layers"])):
            if [len(row) for row in gates[key]] != [experts] * len(rows):
                wanted = f"expected {len(rows)} rows of {experts} values"
                raise CheckpointError(f"{file}: {COURSE}.gates.{key}: {wanted}")


def note(metadata: dict[str, Any], step: MergeStep) -> None:
    """Note how the gates of a task learned."""
    noted = metadata.get(COURSE)
    known = noted if isinstance(noted, dict) else {}
    trace = {} if step.trace is None else _series(asdict(step.trace))
    tasks = known.get("tasks", {}) | {step.task: trace}
    metadata[COURSE] = {"tasks": tasks}  # gates are others after every merge


def forget(metadata: dict[str, Any], name: str) -> None:
    """Forget how a task's gates learned, once it has left the merge; and all gates, which are others now."""
    noted = metadata.get(COURSE)
    tasks = noted.get("tasks") if isinstance(noted, dict) else None
    if isinstance(tasks, dict):
        metadata[COURSE] = {"tasks": {task: own for task, own in tasks.items() if task != name}}


def note_gates(metadata: dict[str, Any], gates: Mapping[str, Any] | None) -> None:
    """Note the gates after a merge whose steps were noted, as `summary` gives them; None notes nothing."""
    if gates is not None:
        metadata[COURSE] = metadata[COURSE] | {"gates": gates}


def of_trace(trace: Mapping[str, Any]) -> dict[str, Any]:
    """The course of which `mingle.runs.report` describes the trace, one method's."""
    names = trace["order"]
    keys = ("loss", "interference", "strength")
    tasks = {name: _series({key: trace[key][place] for key in keys}) for place, name in enumerate(names)}
    if not trace["gates"]:
        return {"tasks": tasks}
    count = len(trace["gates"][0][0]) if trace["layers"] else 0
    # a skipped task has no loss and no expert
    owners = [task for task, loss in enumerate(trace["loss"]) if loss]
    owners = owners if len(owners) == count else list(range(count))
    return {"tasks": tasks, "gates": summary(trace["gates"], names, owners, trace["layers"])}


def summary(
    gates: Sequence[Sequence[Sequence[float]]],
    names: Sequence[str],
    owners: Sequence[int],
    layers: Sequence[str],
) -> dict[str, Any]:
    """The gates of a merged model.

    Args:
        gates: the mean gate values of the experts in every layer on the samples of every task, [T × L × E].
        names: of the tasks.
        owners: the number of every expert's task.
        layers: their names.
    """
    mean = [[_rounded(statistics.fmean(column)) for column in zip(*task, strict=True)] for task in gates]
    own = [
        [_above(gates[task][layer], expert) for expert, task in enumerate(owners)]
        for layer in range(len(layers))
    ]
    experts = [names[task] for task in owners]
    return {"tasks": list(names), "experts": experts, "layers": list(layers), "mean": mean, "own": own}


def block_of(layer: str) -> str:
    """The block that a layer is in: ``encoder.layers.0.mlp.fc1`` is in ``encoder.layers.0``."""
    return re.sub(r"^(\D*\d+).*", r"\1", layer)


def _above(values: Sequence[float], expert: int) -> float | None:
    others = [value for place, value in enumerate(values) if place != expert]
    return _rounded(values[expert] - statistics.fmean(others)) if others else None


def _series(trace: Mapping[str, Any]) -> dict[str, Any]:
    if not trace["loss"]:
        return {}
    parts = {key: _by_block(trace[key]) for key in ("interference", "strength")}
    return {"steps": len(trace["loss"]), "loss": _thinned(trace["loss"]), **parts}


def _by_block(layers: Mapping[str, Sequence[float]]) -> dict[str, list[float | None]]:
    blocks: dict[str, list[Sequence[float]]] = {}
    for layer, values in layers.items():
        blocks.setdefault(block_of(layer), []).append(values)
    return {
        block: _thinned([statistics.fmean(step) for step in zip(*series, strict=True)])
        for block, series in blocks.items()
    }


def _thinned(values: Sequence[float]) -> list[float | None]:
    last, count = len(values) - 1, min(len(values), _POINTS)
    places = [round(i * last / max(count - 1, 1)) for i in range(count)]
    return [_rounded(values[place]) for place in places]


def _rounded(value: float | None) -> float | None:
    """Without digits that nobody sees; None for what JSON cannot hold."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.{_DIGITS}g}")
