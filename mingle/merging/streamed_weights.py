"""Weights merged tensor by tensor into files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mingle import ranks
from mingle.io.journal import Journal, PartFiles
from mingle.io.lazy_tensors import Rows, row_blocks, rows_of
from mingle.kernels.dtypes import wide
from mingle.merging.finetuned import FineTuned
from mingle.merging.finite import NonFiniteMerge, refuse
from mingle.merging.parts import Parts
from mingle.methods.base import Tensors, kept_size
from mingle.methods.tensorwise import Numbers, Seen, Survey, TensorMethod, TensorStep
from mingle.tasks.loading import BaseTensors


class Arriving(NamedTuple):
    """A model that is merged.

    Attributes:
        name: the task's.
        tuned: the fine-tuned model.
        seed: of everything random.
    """

    name: str
    tuned: FineTuned
    seed: int


class WeightStep:
    """The passes over all tensors that merge one model, or the single one that merges several in turn.

    Args:
        method: the merger's, on the meta device.
        values: the whole base's tensors.
        state: what is kept of all earlier tasks together, by the names that it is saved under.
        models: those that arrive; several only where `TensorMethod.in_one_pass` says that it can be.
        before: how many tasks are merged.
        notes: what an interrupted run of this very step has finished.
        part_bytes: it goes in parts of about so many.
    """

    def __init__(
        self,
        method: TensorMethod,
        values: BaseTensors,
        state: Mapping[str, Tensor],
        models: Sequence[Arriving],
        before: int,
        notes: Journal,
        part_bytes: int,
    ) -> None:
        self.method, self.values, self.state = method, values, state
        self.models, self.before, self.notes = models, before, notes
        self.prefix = models[0].tuned.prefix
        sizes = {name: kept_size([base]) + method.cost_of(name).kept for name, base in method.base.items()}
        self.parts = Parts(sizes, method.work_of, part_bytes, notes)

    def run(self) -> list[dict[str, Any]]:
        """Merge; what earlier runs have finished is taken.

        Returns:
            The entries of the new state's files.
        """
        found: Numbers = {}
        if self.before:
            found = {name: float(self.state[f"state/{name}"]) for name in self.method.shared}
        aside: dict[str, dict[str, tuple[PartFiles, str]]] = {}
        surveys = self.method.surveys(self.before)
        for number in range(surveys):
            survey = self.method.survey(number, self.before, found)
            found |= self._survey(number, survey)
            if survey.sets_aside:
                files = PartFiles(self.notes.folder, self.notes.parts(number))
                for place in files:
                    key, _, name = place.partition("/")
                    aside.setdefault(name, {})[key] = files, place
        return self._merge(surveys, found, aside)

    def _survey(self, number: int, survey: Survey) -> Numbers:
        known = self.notes.found(number)
        if known is not None and not (survey.sets_aside and self.parts.left(number)):
            return known
        seen: dict[int, list[tuple[float, ...]]] = {}
        for place, names in self.parts.mine(number):
            tensors: Tensors = {}
            seen[place] = []
            for name in names:
                numbers, aside = self._surveyed(survey, name)
                seen[place].append(numbers)
                tensors |= {f"{key}/{name}": tensor for key, tensor in aside.items()}
            if survey.sets_aside:
                self.notes.write(number, place, tensors, seen[place], aside=True)
        if survey.sets_aside:
            self.notes.share(number)
            found = survey.conclude(self.notes.numbers(number))
        else:
            ranks.sum_(*survey.counts())
            all_seen = {place: rows for each in ranks.gather(seen) for place, rows in each.items()}
            found = survey.conclude([row for place in sorted(all_seen) for row in all_seen[place]])
        self.notes.conclude(number, found)
        return found

    def _merge(
        self, number: int, found: Numbers, aside: Mapping[str, Mapping[str, tuple[PartFiles, str]]]
    ) -> list[dict[str, Any]]:
        for place, names in self.parts.mine(number):
            tensors: Tensors = {}
            for name in names:
                tensors |= self._merged(name, found, aside.get(name, {}))
            self.notes.write(number, place, tensors)
        self.notes.share(number)
        return self.notes.parts(number)

    def _surveyed(self, survey: Survey, name: str) -> Seen:
        """What a survey takes down of a tensor."""
        parts = []
        for rows in self._blocks(name, self.method.elementwise(name)):
            base = self._base(name, rows)
            parts.append(survey.see(self._step(name, rows, 0, base, self._state_of(name, rows))))
        numbers = tuple(map(sum, zip(*(part.numbers for part in parts), strict=True)))
        seen = parts[0] if len(parts) == 1 else Seen(numbers)
        if not all(map(math.isfinite, seen.numbers)):
            where = f"method {self.method.name!r}, task {self.models[0].name!r}: {name}"
            raise NonFiniteMerge(f"{where}: its norm is not finite; nothing was saved")
        return seen

    def _merged(self, name: str, found: Numbers, aside: Mapping[str, tuple[PartFiles, str]]) -> Tensors:
        """What is saved of a tensor, by the names that it is saved under."""
        new: Tensors = {}
        for rows in self._blocks(name, self.method.in_rows(name)):
            laid = {key: files.rows(of, rows) for key, (files, of) in aside.items()}
            part = self._merged_rows(name, rows, found, laid)
            if rows is ...:
                new = part
            for key, tensor in part.items() if rows is not ... else ():
                if key not in new:
                    new[key] = tensor.new_empty(self.method.base[name].shape)
                new[key][rows] = tensor
        if name == self.parts.all[-1].names[-1]:
            shared = {f"state/{key}": tensor for key, tensor in self.method.shared_tensors(found).items()}
            self._refuse(self.models[-1], shared)
            new |= shared
        return new

    def _merged_rows(self, name: str, rows: Rows, found: Numbers, laid: Mapping[str, Tensor]) -> Tensors:
        """The same of some rows, where one model is merged after another."""
        base, state = self._base(name, rows), self._state_of(name, rows)
        served = self.prefix + name
        dtype = self.values.described(served).dtype
        for place, model in enumerate(self.models):
            merged, kept = self.method.merge_tensor(self._step(name, rows, place, base, state), found, laid)
            state = {f"merged/{name}": merged} | {f"state/{key}": tensor for key, tensor in kept.items()}
            self._refuse(model, state)
            if dtype != merged.dtype:  # as it is put into the model, which may have less precision
                refuse(self.method, model.name, served, merged, dtype)
        return state

    def _refuse(self, model: Arriving, tensors: Tensors) -> None:
        """Raise `NonFiniteMerge` unless what merging a model gives is finite."""
        for key, tensor in tensors.items():
            refuse(self.method, model.name, key, tensor)

    def _blocks(self, name: str, in_rows: bool) -> list[Rows]:
        """The rows of a tensor that are in memory at once; all of them unless `in_rows`."""
        sources = [model.tuned.in_rows(name) for model in self.models]
        readable = self.values.in_rows(self.prefix + name) and all(sources)
        return row_blocks(self.method.base[name]) if readable and in_rows else [...]

    def _base(self, name: str, rows: Rows) -> Tensor:
        return self.values.rows(self.prefix + name, rows)

    def _state_of(self, name: str, rows: Rows) -> Tensors:
        """What there is of rows of a tensor before the step, by the names that it is saved under."""
        keys = (f"merged/{name}", *(f"state/{key}" for key in self.method.kept_of(name)))
        return {key: rows_of(self.state, key, rows) for key in keys if self.before and key in self.state}

    def _step(self, name: str, rows: Rows, place: int, base: Tensor, state: Tensors) -> TensorStep:
        """Rows of a tensor when the model at that place arrives, with what there is of them by then."""
        merged, model = state.get(f"merged/{name}", base), self.models[place]
        kept = {key: state[f"state/{key}"] for key in self.method.kept_of(name) if f"state/{key}" in state}
        tuned = model.tuned.tensor(name, base, rows)
        seen = self.before + place
        return TensorStep(name, base, merged.to(wide(merged)), tuned, kept, seen, model.seed)
