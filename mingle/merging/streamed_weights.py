"""Weights merged tensor by tensor into files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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


class WeightStep:
    """The passes over all tensors that merge one model.

    Args:
        method: the merger's, on the meta device.
        values: the whole base's tensors.
        state: what is kept of all earlier tasks together, by the names that it is saved under.
        name: the task's.
        tuned: the fine-tuned model.
        seed: of everything random.
        before: how many tasks are merged.
        notes: what an interrupted run of this very step has finished.
        part_bytes: it goes in parts of about so many.
    """

    def __init__(
        self,
        method: TensorMethod,
        values: BaseTensors,
        state: Mapping[str, Tensor],
        name: str,
        tuned: FineTuned,
        seed: int,
        before: int,
        notes: Journal,
        part_bytes: int,
    ) -> None:
        self.method, self.values, self.state = method, values, state
        self.task, self.tuned, self.seed, self.before, self.notes = name, tuned, seed, before, notes
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
                laid = {key: files[of] for key, (files, of) in aside.get(name, {}).items()}
                tensors |= self._merged(name, found, laid)
            self.notes.write(number, place, tensors)
        self.notes.share(number)
        return self.notes.parts(number)

    def _surveyed(self, survey: Survey, name: str) -> Seen:
        """What a survey takes down of a tensor."""
        parts = [survey.see(self._step(name, rows)) for rows in self._blocks(name)]
        numbers = tuple(map(sum, zip(*(part.numbers for part in parts), strict=True)))
        seen = parts[0] if len(parts) == 1 else Seen(numbers)
        if not all(map(math.isfinite, seen.numbers)):
            where = f"method {self.method.name!r}, task {self.task!r}: {name}"
            raise NonFiniteMerge(f"{where}: its norm is not finite; nothing was saved")
        return seen

    def _merged(self, name: str, found: Numbers, laid: Mapping[str, Tensor]) -> Tensors:
        """What is saved of a tensor, by the names that it is saved under."""
        new: Tensors = {}
        for rows in self._blocks(name):
            merged, kept = self.method.merge_tensor(self._step(name, rows), found, laid)
            part = {f"merged/{name}": merged} | {f"state/{key}": tensor for key, tensor in kept.items()}
            if rows is ...:
                new = part
            for key, tensor in part.items() if rows is not ... else ():
                if key not in new:
                    new[key] = tensor.new_empty(self.method.base[name].shape)
                new[key][rows] = tensor
        if name == self.parts.all[-1].names[-1]:
            new |= {f"state/{key}": tensor for key, tensor in self.method.shared_tensors(found).items()}
        for key, tensor in new.items():
            refuse(self.method, self.task, key, tensor)
        served, merged = self.tuned.prefix + name, new[f"merged/{name}"]
        # as it is put into the model, which may have less precision
        if (dtype := self.values.described(served).dtype) != merged.dtype:
            refuse(self.method, self.task, served, merged, dtype)
        return new

    def _blocks(self, name: str) -> list[Rows]:
        """The rows of a tensor that are in memory at once."""
        readable = self.values.in_rows(self.tuned.prefix + name) and self.tuned.in_rows(name)
        return row_blocks(self.method.base[name]) if readable and self.method.elementwise(name) else [...]

    def _step(self, name: str, rows: Rows) -> TensorStep:
        base, state = self.values.rows(self.tuned.prefix + name, rows), self.state
        merged = rows_of(state, f"merged/{name}", rows) if self.before else base
        places = {key: f"state/{key}" for key in self.method.kept_of(name)} if self.before else {}
        return TensorStep(
            name,
            base,
            merged.to(wide(merged)),
            self.tuned.tensor(name, base, rows),
            {key: rows_of(state, place, rows) for key, place in places.items() if place in state},
            self.before,
            self.seed,
        )
