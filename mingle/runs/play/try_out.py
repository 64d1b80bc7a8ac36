"""A merged model's answer to one input, beside those of its base and of every task's own expert."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mingle.merging.merger import Merger
from mingle.merging.predict import AllTasks, lacking
from mingle.methods.gated import GatedMethod
from mingle.methods.routing import RouterMethod
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import observed
from mingle.options import OptionError
from mingle.runs.play.trial import Answer, Gates, Likely, Routing, Trial
from mingle.tasks.data import TaskData
from mingle.tasks.readers import ANSWER_TOKENS, Reader, ReadingError, reader_of

#: how many of the likeliest classes an answer names
MOST_CLASSES = 5


class TryOut:
    """A merged model that answers single inputs, with all of its tasks or only some of them.

    Tasks are switched off for one answer at a time: the merger stays as it is.  Several threads may ask.

    Args:
        merger: a finished merge.
        reader: of what a person gives.
    """

    def __init__(self, merger: Merger, reader: Reader) -> None:
        self.merger, self.reader = merger, reader
        self._lock = threading.Lock()
        #: the last input, and the answers to it that will not change
        self._last: Mapping[str, Tensor] = {}
        self._answers: dict[Any, Answer] = {}

    @classmethod
    def of(cls, folder: str | Path) -> TryOut:
        """The merged model in a folder.

        Raises:
            CheckpointError: see `Merger.from_pretrained`; or a base without an image processor or tokenizer.
            OptionError: no task was merged, or nobody knows how its inputs are made of an image or a text.
        """
        merger = Merger.from_pretrained(folder)
        if not merger.merged:
            raise OptionError(f"{folder}: no task is merged, so there is nothing to try")
        assert merger.base_folder is not None  # without a base in the folder, it would not have been opened
        try:
            reader = reader_of(merger.task, merger.base, merger.base_folder)
        except ReadingError as error:
            raise OptionError(f"{folder}: {error}") from None
        return cls(merger, reader)

    @property
    def modality(self) -> str:
        """``image`` or ``text``: what it is given."""
        return str(self.merger.task.modality)

    @property
    def tasks(self) -> list[str]:
        """The names of all merged tasks, in order of arrival."""
        return self.merger.task_names

    @property
    def fixed(self) -> str:
        """Why tasks cannot be switched off; empty where they can."""
        method, task = self.merger.method, self.merger.task
        if isinstance(method, GatedMethod) or task.one_class:
            return ""
        return f"method {method.name!r} keeps no expert that could be switched off"

    def trials(self, given: Any, active: Collection[str]) -> Iterator[Trial]:
        """Answers to one input, from the merged model first; each trial knows one model's more.

        Args:
            given: the path of an image, or a text.
            active: the tasks that are not switched off.

        Raises:
            ReadingError: an input that cannot be read.
            ValueError: a task that is not merged.
        """
        if unknown := [name for name in active if name not in self.tasks]:
            raise ValueError(f"task {unknown[0]!r} is not among the merged ones")
        sample = self.reader(given)
        chosen = [place for place, name in enumerate(self.tasks) if name in active]
        with self._lock:
            trial = self._merged(sample, chosen)
        yield trial
        key = ("base", *(chosen if self.merger.task.one_class else ()))
        trial = replace(trial, base=self._kept(sample, key, partial(self._base, sample, chosen)))
        yield trial
        for place, name in enumerate(self.tasks):
            answer = self._kept(sample, place, partial(self._expert, sample, place))
            trial = replace(trial, experts={**trial.experts, name: answer})
            yield trial

    def trial(self, given: Any, active: Collection[str]) -> Trial:
        """The last of the `trials`, which knows all."""
        *_, last = self.trials(given, active)
        return last

    def _kept(self, sample: Mapping[str, Tensor], key: Any, make: Callable[[], Answer]) -> Answer:
        """The answer under that key, made where the last one was to another input."""
        with self._lock:
            same = self._last.keys() == sample.keys() and all(
                torch.equal(self._last[name], tensor) for name, tensor in sample.items()
            )
            if not same:
                self._last, self._answers = sample, {}
            if key not in self._answers:
                self._answers[key] = make()
            return self._answers[key]

    def _merged(self, sample: Mapping[str, Tensor], chosen: Sequence[int]) -> Trial:
        """What the merged model answers when only the chosen tasks are active."""
        method, names = self.merger.method, self.tasks
        only: Any = nullcontext()
        if isinstance(method, GatedMethod) and len(chosen) < len(names):
            only = method.only(chosen)
        with only, _recorded(method) as gates:
            routing, task = self._routing(sample, chosen)
            answer = Answer(reason=f"method {method.name!r} keeps one model per task, and merges none")
            if not method.per_task:
                answer = self._answer(self.merger.model, sample, chosen, task)
        active = tuple(names[place] for place in chosen)
        return Trial(active, answer, routing, self._gates(gates))

    def _routing(self, sample: Mapping[str, Tensor], chosen: Sequence[int]) -> tuple[Routing, int | None]:
        """What the router says, and the task that it chose, where answers are classes of that task alone."""
        method, one_class = self.merger.method, self.merger.task.one_class
        if not isinstance(method, RouterMethod):
            told = ": the likeliest of all classes decides" if one_class and not method.per_task else ""
            return Routing(reason=f"method {method.name!r} has no router{told}"), None
        able = [place for place in chosen if method.places[place] is not None]
        if reason := self._hindrance(chosen):
            return Routing(reason=reason), None
        decision = method.decision(self._data(sample, chosen)) if able else None
        if decision is None:
            return Routing(reason="no active task has an expert, so there is nothing to choose from"), None
        shares = decision.shares[0].tolist()
        found = {self.tasks[place]: shares[place] for place in able}
        likeliest = max(able, key=shares.__getitem__)
        return Routing(found, bool(decision.strange[0])), likeliest if one_class else None

    def _base(self, sample: Mapping[str, Tensor], chosen: Sequence[int]) -> Answer:
        return self._answer(self.merger.base, sample, chosen, None, calibrated=False)

    def _expert(self, sample: Mapping[str, Tensor], place: int) -> Answer:
        """The answer of one task's own expert, on its own: among the classes of its task."""
        method = self.merger.method
        if method.per_task:
            model = self.merger.model_for(self.tasks[place])
            return self._answer(model, sample, [place], None, calibrated=False)
        if not isinstance(method, GatedMethod):
            return Answer(reason=f"method {method.name!r} keeps no expert of a task")
        with method.alone(place):
            return self._answer(self.merger.model, sample, [place], None, calibrated=False)

    def _answer(
        self,
        model: nn.Module,
        sample: Mapping[str, Tensor],
        chosen: Sequence[int],
        routed: int | None,
        *,
        calibrated: bool = True,
    ) -> Answer:
        """What a model answers.

        Args:
            model: the model.
            sample: its input.
            chosen: the tasks whose classes it may answer with.
            routed: that one of them which a router chose.
            calibrated: whether the temperatures of the merged model count.
        """
        merger = self.merger
        if not merger.task.one_class:
            tokens = merger.task.written(model, merger.task.data(sample), ANSWER_TOKENS)
            return Answer(text=self.reader.decode(tokens))
        if reason := self._hindrance(chosen):
            return Answer(reason=reason)
        tasks = [merger.merged[place] for place in chosen]
        heads = [task.head for task in tasks]
        temperatures = [task.temperature if calibrated else None for task in tasks]
        everything = AllTasks(merger.task, merger.method, [task.name for task in tasks], heads, temperatures)
        number = None if routed is None else torch.tensor([chosen.index(routed)])
        shares = everything.shares(model, self._data(sample, chosen), number)
        likely = [
            Likely(task.name, f"class {c}" if task.labels is None else task.labels[c], probability)
            for place, task, part in zip(chosen, tasks, shares, strict=True)
            for c, probability in enumerate(part[0].tolist())
            if routed in (None, place)
        ]
        likely.sort(key=lambda each: -each.probability)
        return Answer(tuple(likely[:MOST_CLASSES]))

    def _hindrance(self, chosen: Sequence[int]) -> str:
        """Why nothing can be answered among the classes of these tasks; empty where answers are texts."""
        task_type, tasks = self.merger.task, [self.merger.merged[place] for place in chosen]
        if not task_type.one_class:
            return ""
        if not tasks:
            return "no task is active, so there are no classes to choose from"
        return next(filter(None, (lacking(task_type, task.name, task.head) for task in tasks)), "")

    def _data(self, sample: Mapping[str, Tensor], chosen: Sequence[int]) -> TaskData:
        return self.merger.task.data({**sample, **self.merger.merged[chosen[0]].shared})

    def _gates(self, recorded: Mapping[str, Tensor]) -> Gates:
        method = self.merger.method
        if not isinstance(method, GatedMethod):
            return Gates(
                reason=f"method {method.name!r} has no gates: its weights are the same for all inputs"
            )
        if not recorded:
            return Gates(reason="the merged model was not asked")
        missing = {name: torch.full((layer.num_experts,), torch.nan) for name, layer in method.layers.items()}
        values = method.by_task({name: recorded.get(name, none) for name, none in missing.items()}).mT
        able = [name for name, place in zip(self.tasks, method.places, strict=True) if place is not None]
        rows = tuple(tuple(row) for row in values.tolist())
        return Gates(tuple(method.layers), tuple(able), rows)


@contextmanager
def _recorded(method: Any) -> Iterator[dict[str, Tensor]]:
    """Inside the block, every layer's gates [T] are noted, the mean over all tokens that it is given."""
    means: dict[str, Tensor] = {}
    if not isinstance(method, GatedMethod):
        yield means
        return
    counts = dict.fromkeys(method.layers, 0)

    def note(name: str, layer: MingleLinear, x: Tensor) -> None:
        rows = layer.gates(x).double().flatten(0, -2).cpu()
        counts[name] += len(rows)
        before = means.get(name, torch.zeros_like(rows[0]))
        means[name] = before + (rows.mean(0) - before) * len(rows) / counts[name]

    with observed(method.layers, note):
        yield means
