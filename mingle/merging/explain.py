"""Why a merged model answers less well than the fine-tuned ones: their difference, taken apart step by step.

Every step takes something from a task's fine-tuned model that merging takes from it, or adds something that
the merged model has; after the last one it is the merged model.  What a step changes is measured where it
comes in this order: in another, shares might be others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mingle.merging.evaluate import accuracy
from mingle.merging.finetuned import FineTuned, Model
from mingle.merging.merger import Merger
from mingle.methods.experts import make_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.routing import RoutedMethod
from mingle.nn.matrices import oriented
from mingle.nn.observe import gates_made_of
from mingle.tasks import TaskData
from mingle.tasks.heads import put_head

#: step → what it does to a task, in order; which of them there are depends on the method
STEPS: dict[str, str] = {
    "other tensors": "what is not merged is as in the base",
    "rank": "its experts have leading directions only",
    "projection": "its experts have no directions of older experts",
    "own gate": "its experts are weighed by their gates",
    "routing": "a router chooses the experts",
    "older tasks": "beside those merged before it",
    "newer tasks": "beside those merged after it",
    "all tasks": "beside all others",
}


@dataclass(frozen=True)
class Explanation:
    """What becomes of a task's accuracy on the way into the merged model.

    Attributes:
        task: its name.
        start: what is taken apart: its fine-tuned model, or, where that is not at hand, its own expert alone.
        before: the accuracy of that, in per cent.
        changes: what every step changes, in points, by the names in `STEPS`; their sum leads to `merged`.
        merged: the merged model's accuracy.
    """

    task: str
    start: str
    before: float
    changes: dict[str, float]
    merged: float


def explain(
    merger: Merger,
    samples: Mapping[str, TaskData | Mapping[str, Any]],
    models: Mapping[str, Model] | None = None,
    batch_size: int = 128,
    on_task: Callable[[str], None] | None = None,
) -> list[Explanation]:
    """Every merged task's, in order of arrival.

    Args:
        merger: a finished merge.
        samples: labelled test samples of all its tasks.
        models: the fine-tuned models that were merged; of a task without one, fewer steps are known.
        batch_size: samples per batch.
        on_task: told of every task before it is looked at.

    Raises:
        ValueError: a task without samples, or one of a method without experts whose model is missing, of
            which nothing could be said; a model that is not a fine-tuned version of the base.
    """
    models = models or {}
    if missing := [name for name in merger.task_names if name not in samples]:
        raise ValueError(f"no samples of the merged task {missing[0]!r}")
    alone = [name for place, name in enumerate(merger.task_names) if not _has_experts(merger, place)]
    if missing := [name for name in alone if name not in models]:
        raise ValueError(
            f"task {missing[0]!r}: method {merger.method.name!r} keeps no expert of it that could be looked "
            "at alone; give its fine-tuned model"
        )
    found = []
    for place, name in enumerate(merger.task_names):
        if on_task is not None:
            on_task(name)
        data = merger.task.data(samples[name])
        (start, before), *later = _Stages(merger, place, data, batch_size).measured(models.get(name))
        accuracies = [before, *(value for _, value in later)]
        changes = {
            step: now - then for (step, _), then, now in zip(later, accuracies, accuracies[1:], strict=False)
        }
        found.append(Explanation(name, start, before, changes, accuracies[-1]))
    return found


def _has_experts(merger: Merger, place: int) -> bool:
    """Whether the method keeps experts of the untouched base for the task alone."""
    try:
        merger.method.adapter(place)
    except ValueError:
        return False
    return isinstance(merger.method, GatedMethod) and not merger.method.sequential


class _Stages:
    """The models between a task's fine-tuned one and the merged one, measured one after another."""

    def __init__(self, merger: Merger, place: int, data: TaskData, batch_size: int) -> None:
        self.merger, self.place, self.data, self.batch_size = merger, place, data, batch_size
        self.name = merger.task_names[place]

    def measured(self, model: Model | None) -> Iterator[tuple[str, float]]:
        """Step by step: its name, or at first that of the start, and the accuracy after it."""
        merger, method = self.merger, self.merger.method
        experts = _has_experts(merger, self.place)
        if model is not None:
            try:
                finetuned = FineTuned(model, merger.base, merger.task, merger.vocabulary, merger.base_folder)
                tuned = finetuned.tensors()
            except ValueError as error:
                raise type(error)(f"task {self.name!r}: {error}") from None
            yield "fine-tuned", self._of(tuned)
            kept = {name: tuned[name] for name in method.merges()}
            yield "other tensors", self._of(kept)
            if experts:
                yield "rank", self._of(self._truncated(tuned))
        if not experts:
            when = merger.matrix[self.place][self.place]
            if when is not None:
                yield "older tasks", when
            yield "all tasks" if when is None else "newer tasks", self._merged()
            return
        assert isinstance(method, GatedMethod)
        if model is None or not isinstance(method, RoutedMethod):
            own = method.fold(method.own_gates(self.place))
            yield "own expert" if model is None else "projection", self._of(own)
        if isinstance(method, RoutedMethod):
            yield "routing", self._merged()
            return
        place = method.places[self.place]
        count = next(iter(method.layers.values())).num_experts
        yield "own gate", self._merged([] if place is None else [place])
        first = sum(earlier is not None for earlier in method.places[: self.place])
        yield "older tasks", self._merged(range(first + (place is not None)))
        yield "newer tasks", self._merged(range(count))

    def _of(self, tensors: Mapping[str, Tensor]) -> float:
        """The accuracy of the base with these tensors in its tower, and the task's own head."""
        merger = self.merger
        model = copy.deepcopy(merger.base).eval()
        put_head(model, merger.merged[self.place].tensors)
        model.get_submodule(merger.task.tower(model)).load_state_dict(dict(tensors), strict=False)
        return accuracy(merger.task, model, self.data, self.batch_size)

    def _truncated(self, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the layers with experts as these would make them, had they not been projected."""
        method = self.merger.method
        assert isinstance(method, GatedMethod)
        before = {name: method.start()[f"{name}.weight"] for name in method.layers}
        deltas = {
            name: oriented(tuned[f"{name}.weight"] - before[name].to(tuned[f"{name}.weight"]), layer)
            for name, layer in method.layers.items()
        }
        experts = make_experts(deltas, dict.fromkeys(deltas, ()), method.options.rank)
        return {
            f"{name}.weight": before[name] + oriented(experts[name].delta(), layer).to(before[name])
            for name, layer in method.layers.items()
        }

    def _merged(self, kept: Sequence[int] | None = None) -> float:
        """The accuracy of the merged model, or of it with some of its experts only."""
        merger, method = self.merger, self.merger.method
        model = merger.model_for(self.name)
        if kept is None:
            return accuracy(merger.task, model, self.data, self.batch_size)
        assert isinstance(method, GatedMethod)
        with gates_made_of(method.layers, partial(_only, kept)):
            return accuracy(merger.task, model, self.data, self.batch_size)


def _only(kept: Sequence[int], gates: Tensor) -> Tensor:
    """Gates [..., T] that are 0 but for those of the experts at these places."""
    places = torch.tensor(kept, dtype=torch.long, device=gates.device)
    return gates * torch.zeros_like(gates).index_fill_(-1, places, 1)
