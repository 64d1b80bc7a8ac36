"""The course of all adaptations of a merge, and its gates, as plain data for plots and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mingle.merging.evaluate import gate_activation
from mingle.merging.merger import Merger
from mingle.methods.mingle import Mingle
from mingle.runs.course import summary
from mingle.runs.loop import MergeStep
from mingle.suites import Suite

#: of each task's test samples; at most twice as many are looked at
_FEW_SAMPLES = 128


def trace_of(merger: Merger, suite: Suite, steps: Sequence[MergeStep]) -> dict[str, Any]:
    """The losses, S and λ of all steps, and after the last merge the gates over some samples of each task.

    `mingle.runs.report` describes the format.  Empty for methods other than MINGLE and its variants, and
    where not all tasks were adapted.
    """
    recorded = [step.trace for step in steps if step.trace is not None]
    if not isinstance(merger.method, Mingle) or len(recorded) < len(steps):
        return {}
    series = {
        key: [getattr(trace, key) for trace in recorded] for key in ("loss", "interference", "strength")
    }
    layers, gates = merger.method.layers, _mean_gates(merger, merger.method, suite)
    return {"order": merger.task_names, "layers": list(layers), "gates": gates, **series}


def gates_of(merger: Merger, suite: Suite) -> dict[str, Any] | None:
    """The gates of a merged model over some test samples of each task, see `mingle.runs.course.summary`.

    None for methods other than MINGLE and its variants.
    """
    if not isinstance(merger.method, Mingle) or not merger.method.layers:
        return None
    method = merger.method
    owners = sorted((place, task) for task, place in enumerate(method.places) if place is not None)
    gates = _mean_gates(merger, method, suite)
    return summary(gates, merger.task_names, [task for _, task in owners], list(method.layers))


@torch.no_grad()
def _mean_gates(merger: Merger, method: Mingle, suite: Suite) -> list[list[list[float]]]:
    """Of every task, layer and expert, along the merged model's own answers."""
    gates = []
    for name in merger.task_names:
        data = suite[name]
        few = data.select(torch.arange(0, len(data), max(1, len(data) // _FEW_SAMPLES)))
        few = merger.task.prepared(lambda: merger.model, few)
        gates.append(gate_activation(merger.task, merger.model, method.layers, few).tolist())
    return gates
