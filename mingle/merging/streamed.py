"""Merges from folder to folder that never have more than one tensor of a model in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.io import journal, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.journal import Journal, PartFiles
from mingle.io.manifest import MANIFEST, entries_of
from mingle.io.provenance import versions
from mingle.io.state_dicts import IncompatibleModel, non_finite, state_hash
from mingle.kernels.dtypes import wide
from mingle.merging.finetuned import FineTuned
from mingle.merging.finite import NonFiniteMerge
from mingle.merging.merged_task import MergedTask, own_head
from mingle.merging.opened import opened
from mingle.merging.state import MergeState, model_name
from mingle.methods import MergeMethod
from mingle.methods.base import Tensors, WeightMethod, kept_size
from mingle.methods.tensorwise import Numbers, Seen, Survey, TensorMethod, TensorStep
from mingle.tasks import TaskType
from mingle.tasks.image_settings import differing_preparation
from mingle.tasks.loading import BaseTensors

logger = logging.getLogger(__name__)

#: how many bytes of finished tensors are written together, where they are not of a single larger tensor; no
#: more than that has to be made again after an interruption
PART_BYTES = 128 << 20


def streams(method: type[MergeMethod], task: TaskType, base: nn.Module) -> bool:
    """Whether merges by a method into a base of that kind can go tensor by tensor.

    Args:
        method: its class.
        task: the base's task type.
        base: the base or its skeleton.
    """
    return (
        issubclass(method, TensorMethod)
        and method.add is WeightMethod.add
        and method.update is TensorMethod.update
        and task.loads_as_stored
        # of buffers it depends on the architecture in which dtype they are loaded
        and all(name in dict(base.named_parameters(remove_duplicate=False)) for name in base.state_dict())
    )


class StreamedMerger(MergeState):
    """Does what `mingle.Merger` does with the methods that `streams` names, to the bit, in files alone.

    Its models stay where they are: the base and the fine-tuned ones in their folders, what is merged in the
    merger's folder.  So there is nothing to evaluate or to predict with; that is for a `Merger` which reads
    the folder.

        merger = StreamedMerger("base", method="opcm")
        merger.add("svhn", Path("base_svhn"), Path("merged"))     # and next month:
        merger = StreamedMerger.from_pretrained(Path("merged"))

    Args:
        base_model: the folder of the base model.
        method, task_type, more: see `mingle.Merger`.

    Attributes:
        state: what is merged, by the names that it is saved under.
        entries: of its files in the manifest.
    """

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        method: str,
        task_type: str | TaskType | None = None,
        **more: Any,
    ) -> None:
        super().__init__(base_model, method, task_type, **more)
        if not streams(type(self.method), self.task, self.base):
            raise ValueError(f"method {method!r} cannot merge this base tensor by tensor; use mingle.Merger")
        self.state: Mapping[str, Tensor] = {}
        self.entries: list[dict[str, Any]] = []

    def add(self, name: str, model: Path, folder: Path, digest: str = "", *, keep: int | None = None) -> None:
        """Merge one more fine-tuned model, and save.

        An interrupted call leaves the folder's merge as it was, and beside it what was finished: the same
        call goes on from there.

        Args:
            name: the task's name, new to this merger.
            model: the folder of the fine-tuned model or of its LoRA adapter.
            folder: the merger's, always the same one.
            digest: of the model's files; with other files than before, the step starts again.
            keep: see `mingle.Merger.save_pretrained`.

        Raises:
            ValueError, CheckpointError, NonFiniteMerge: as `mingle.Merger.add` and `save_pretrained`.
        """
        self.check_name(name)
        with merger_folder.writing(folder), ranks.together(f"merging {name!r}"):
            try:
                tuned = FineTuned(model, self.base, self.task, self.vocabulary, self.base_folder)
                left = tuned.left(self.method.merges(), self.values)
                left += differing_preparation(Path(self.base_folder or ""), model)
                own = own_head(tuned.head(self.values), None, tuned.labels)
                self.task.check_head(own)
                notes = merger_folder.begin(folder, self._identity(name, digest))
                entries = _Step(self, name, tuned, folder, notes).run()
            except (IncompatibleModel, CheckpointError) as error:
                raise type(error)(f"task {name!r}: {error}") from None
            for line in left:
                logger.info("%s: %s", name, line)
            labels = None if own.labels is None else list(own.labels)
            task = MergedTask(
                name, 0, None, left, labels, None, model_name(model), dict(own.tensors), dict(own.shared)
            )
            self._save(folder, task, entries, keep)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """The merger of a folder that holds a merge, whatever has written it.

        Raises:
            CheckpointError: as `mingle.Merger.from_pretrained`.
        """
        saved = opened(folder)
        merger = cls._begun(saved.manifest, saved.base_folder(), None, None, folder / MANIFEST)
        merger.base_name = saved.base_name()
        saved.check_base(merger.base_hash)
        merger.metadata = saved.manifest["metadata"]
        merger.state, merger.entries = saved.state_files(), entries_of(saved.manifest["state"])
        try:
            for task, tensors in zip(merger.merged, saved.task_tensors(), strict=True):
                if left := sorted(task.take(tensors, merger.task, merger.base)):
                    raise ValueError(f"there is no place for {left[0]!r}")
            merger._check_state()
        except ValueError as error:
            reason = f"the tensors do not fit the method {merger.method.name!r} with these options"
            raise CheckpointError(f"{folder}: {reason}: {error}") from error
        return merger

    @cached_property
    def values(self) -> BaseTensors:
        """The whole base's tensors."""
        assert self.base_folder is not None
        return BaseTensors(self.base_folder, self.base, next(self.base.parameters()).dtype)

    @cached_property
    def base_hash(self) -> str:
        """See `MergeState.base_hash`; one process reads all of the base for it, by tensors."""
        return _hash(self.values)

    @classmethod
    def hash_of(cls, task: TaskType, folder: Path) -> str:
        return _hash(BaseTensors(folder, cls._loaded(task, folder)))

    def _model_of(self, base: nn.Module | str | Path) -> nn.Module:
        return base if isinstance(base, nn.Module) else self._loaded(self.task, Path(base))

    @staticmethod
    def _loaded(task: TaskType, folder: Path) -> nn.Module:
        return task.skeleton(folder).to(torch.float32).eval()

    def _identity(self, name: str, digest: str) -> str:
        """All that a step's result depends on."""
        merged = [entry["sha256"] for entry in self.entries]
        facts = {"name": name, "model": digest, "base": self.base_hash, "merged": merged, "part": PART_BYTES}
        return journal.identity(self._described() | facts | {"versions": versions()})

    def _check_state(self) -> None:
        method = cast(TensorMethod, self.method)
        expected = {f"merged/{name}" for name in method.base} if self.merged else set()
        if missing := sorted(expected - self.state.keys()):
            raise ValueError(f"{missing[0]!r} is missing")

    def _save(self, folder: Path, task: MergedTask, entries: list[dict[str, Any]], keep: int | None) -> None:
        self.merged.append(task)
        for rows in (self.matrix, self.unknown):
            rows.append([None] * len(self.merged))
        before, self.answers = self.answers, {}
        try:
            merger_folder.save(
                folder,
                self._described() | {"metadata": self.metadata},
                self.base_hash,
                self.base_name,
                self._base_model(),
                [each.kept() for each in self.merged],
                entries,
                keep,
            )
        except BaseException:
            self.answers = before
            for each in (self.merged, self.matrix, self.unknown):
                each.pop()
            raise
        self.state, self.entries = PartFiles(folder, entries), entries


def _hash(values: BaseTensors) -> str:
    with ranks.together("reading the base"):
        return ranks.gather(state_hash(values) if ranks.rank() == 0 else "")[0]


class _Step:
    """The passes over all tensors that merge one model.

    Args:
        merger: the merger, before the step.
        name: the task's.
        tuned: the fine-tuned model.
        folder: the merger's.
        notes: what an interrupted run of this very step has finished.
    """

    def __init__(
        self, merger: StreamedMerger, name: str, tuned: FineTuned, folder: Path, notes: Journal
    ) -> None:
        self.merger, self.task, self.tuned, self.folder, self.notes = merger, name, tuned, folder, notes
        self.method = cast(TensorMethod, merger.method)
        self.parts, self.seen = planned(self.method), len(merger.merged)

    def run(self) -> list[dict[str, Any]]:
        """The entries of the new state's files."""
        found: Numbers = {}
        if self.seen:
            found = {name: float(self.merger.state[f"state/{name}"]) for name in self.method.shared}
        aside: dict[str, dict[str, tuple[PartFiles, str]]] = {}
        surveys = self.method.surveys(self.seen)
        for number in range(surveys):
            survey = self.method.survey(number, self.seen, found)
            found |= self._survey(number, survey)
            if survey.sets_aside:
                files = PartFiles(self.folder, self.notes.parts(number))
                for place in files:
                    key, _, name = place.partition("/")
                    aside.setdefault(name, {})[key] = files, place
        return self._merge(surveys, found, aside)

    def _survey(self, number: int, survey: Survey) -> Numbers:
        known = self.notes.found(number)
        if known is not None and not (survey.sets_aside and self._left(number)):
            return known
        seen: dict[int, list[tuple[float, ...]]] = {}
        for part in self._mine(number):
            tensors: Tensors = {}
            seen[part] = []
            for name in self.parts[part]:
                numbers, aside = self._seen(survey, name)
                seen[part].append(numbers)
                tensors |= {f"{key}/{name}": tensor for key, tensor in aside.items()}
            if survey.sets_aside:
                self.notes.write(number, part, tensors, seen[part], aside=True)
        if survey.sets_aside:
            self.notes.share(number)
            found = survey.conclude(self.notes.numbers(number))
        else:
            ranks.sum_(*survey.counts())
            all_seen = {part: rows for each in ranks.gather(seen) for part, rows in each.items()}
            found = survey.conclude([row for part in sorted(all_seen) for row in all_seen[part]])
        self.notes.conclude(number, found)
        return found

    def _merge(
        self, number: int, found: Numbers, aside: Mapping[str, Mapping[str, tuple[PartFiles, str]]]
    ) -> list[dict[str, Any]]:
        for part in self._mine(number):
            tensors: Tensors = {}
            for name in self.parts[part]:
                laid = {key: files[of] for key, (files, of) in aside.get(name, {}).items()}
                tensors |= self._merged(name, found, laid)
            self.notes.write(number, part, tensors)
        self.notes.share(number)
        return self.notes.parts(number)

    def _left(self, number: int) -> list[int]:
        """The parts that a pass has not finished."""
        return sorted(set(range(len(self.parts))) - self.notes.finished(number))

    def _mine(self, number: int) -> list[int]:
        """Those of them that this process is dealt."""
        left = self._left(number)
        work = [sum(map(self.method.work_of, self.parts[part])) for part in left]
        return [left[place] for place in ranks.dealt(work)[ranks.rank()]]

    def _seen(self, survey: Survey, name: str) -> Seen:
        """What a survey takes down of a tensor."""
        seen = survey.see(self._step(name))
        if not all(map(math.isfinite, seen.numbers)):
            where = f"method {self.method.name!r}, task {self.task!r}: {name}"
            raise NonFiniteMerge(f"{where}: its norm is not finite; nothing was saved")
        return seen

    def _merged(self, name: str, found: Numbers, laid: Mapping[str, Tensor]) -> Tensors:
        """What is saved of a tensor, by the names that it is saved under."""
        step = self._step(name)
        merged, kept = self.method.merge_tensor(step, found, laid)
        new = {f"merged/{name}": merged} | {f"state/{key}": tensor for key, tensor in kept.items()}
        if name == self.parts[-1][-1]:
            new |= {f"state/{key}": tensor for key, tensor in self.method.shared_tensors(found).items()}
        served = {f"{self.tuned.prefix}{name}": merged.to(step.base.dtype)}
        for key, tensor in (new if merged.dtype == step.base.dtype else new | served).items():
            if fault := non_finite(tensor):
                where = f"method {self.method.name!r}, task {self.task!r}: {key}"
                raise NonFiniteMerge(f"{where}: {fault}; nothing was saved")
        return new

    def _step(self, name: str) -> TensorStep:
        base, state = self.merger.values[self.tuned.prefix + name], self.merger.state
        merged = state[f"merged/{name}"] if self.seen else base
        places = {key: f"state/{key}" for key in self.method.kept_of(name)} if self.seen else {}
        return TensorStep(
            name,
            base,
            merged.to(wide(merged)),
            self.tuned.tensor(name, base),
            {key: state[place] for key, place in places.items() if place in state},
            self.seen,
        )


def planned(method: TensorMethod) -> list[list[str]]:
    """The names of the tensors of every part: those that follow one another, as many as `PART_BYTES` hold.

    Depends on shapes alone, so that parts are the same whoever makes them, and in how many processes.
    """
    parts: list[list[str]] = []
    filled = 0
    for name, base in method.base.items():
        size = kept_size([base]) + method.cost_of(name).kept
        if not parts or filled + size > PART_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts
