"""Merges from folder to folder that never have more than one tensor of a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.io import journal, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.journal import Journal, PartFiles
from mingle.io.lazy_tensors import Joined
from mingle.io.manifest import MANIFEST, entries_of
from mingle.io.provenance import versions
from mingle.io.state_dicts import first_names
from mingle.merging import exports
from mingle.merging.base_in_files import BaseInFiles, not_as_stored
from mingle.merging.exports import Merged
from mingle.merging.finetuned import FineTuned, of_tasks
from mingle.merging.merged_task import MergedTask, is_own, own_head
from mingle.merging.opened import opened
from mingle.merging.state import model_name
from mingle.merging.streamed_experts import ExpertStep, check_experts
from mingle.merging.streamed_export import Fold, PlainModel
from mingle.merging.streamed_weights import Arriving, WeightStep
from mingle.methods import MergeMethod
from mingle.methods.base import WeightMethod
from mingle.methods.gated import GatedMethod
from mingle.methods.tensorwise import TensorMethod
from mingle.tasks import TaskType
from mingle.tasks.heads import Head, names_of
from mingle.tasks.image_settings import differing_preparation
from mingle.tasks.loading import absent
from mingle.tasks.names import InFiles

logger = logging.getLogger(__name__)

#: how many bytes of finished tensors are written together, where they are not of a single larger tensor; no
#: more than that has to be made again after an interruption
PART_BYTES = 128 << 20


def streams(method: type[MergeMethod], options: Any, task: TaskType, base: nn.Module) -> bool:
    """Whether merges by a method into a base of that kind can go tensor by tensor.

    Args:
        method: its class.
        options: an instance of its `Options`.
        task: the base's task type.
        base: the base or its skeleton.
    """
    plain = (
        issubclass(method, TensorMethod)
        and method.add is WeightMethod.add
        and (method.update is TensorMethod.update or method.updates_alike)
    )
    gated = issubclass(method, GatedMethod) and method.from_weights(options)
    return (plain or gated) and task.loads_as_stored and not not_as_stored(base)


class NewModel(NamedTuple):
    """A fine-tuned model that is to be merged.

    Attributes:
        name: the task's, new to the merger.
        folder: of the model or of its LoRA adapter.
        digest: of its files; with other files than before, an interrupted step starts again.
    """

    name: str
    folder: Path
    digest: str = ""


class StreamedMerger(BaseInFiles):
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
        state: what is kept of all tasks together, by the names that it is saved under.
        entries: of its files in the manifest.
        tasks: those of each task's own files.
    """

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        method: str,
        task_type: str | TaskType | None = None,
        **more: Any,
    ) -> None:
        super().__init__(base_model, method, task_type, **more)
        if not streams(type(self.method), self.options, self.task, self.base):
            raise ValueError(f"method {method!r} cannot merge this base tensor by tensor; use mingle.Merger")
        self.state: Mapping[str, Tensor] = {}
        self.entries: list[dict[str, Any]] = []
        self.tasks: list[list[dict[str, Any]]] = []

    def add(self, name: str, model: Path, folder: Path, digest: str = "", *, keep: int | None = None) -> None:
        """Merge one more fine-tuned model, and save; see `add_all`."""
        self.add_all([NewModel(name, model, digest)], folder, keep=keep)

    def in_one_pass(self, count: int) -> bool:
        """Whether `add_all` can merge that many models."""
        if count == 1:
            return True
        return isinstance(self.method, TensorMethod) and self.method.in_one_pass(len(self.merged), count)

    def add_all(self, models: Sequence[NewModel], folder: Path, *, keep: int | None = None) -> None:
        """Merge fine-tuned models, one after another into each tensor, and save once.

        The merge is that of one `add` for each, to the bit, without a generation for each.  An interrupted
        call leaves the folder's merge as it was, and beside it what was finished: the same call goes on from
        there.

        Args:
            models: those that arrive, in this order; several only where `in_one_pass` says that it can be.
            folder: the merger's, always the same one.
            keep: see `mingle.Merger.save_pretrained`.

        Raises:
            ValueError, CheckpointError, NonFiniteMerge: as `mingle.Merger.add` and `save_pretrained`.
        """
        for model in models:
            self.check_name(model.name)
        names = [model.name for model in models]
        if len(set(names)) < len(names) or not self.in_one_pass(len(names)):
            raise ValueError(f"{', '.join(map(repr, names))}: cannot be merged together; add them one by one")
        with merger_folder.writing(folder), ranks.together(f"merging {', '.join(map(repr, names))}"):
            opened = [self._opened(model, ahead) for ahead, model in enumerate(models)]
            arriving, tasks = [model for model, _ in opened], [task for _, task in opened]
            notes = merger_folder.begin(folder, self._identity(models))
            left = [(task.name, line) for task in tasks for line in task.notes]
            tensors: Mapping[str, Tensor] = {}
            if isinstance(self.method, GatedMethod):
                tensors = self._with_experts(folder, arriving[0], tasks[0], notes)
                entries = self.entries
            else:
                method, before = cast(TensorMethod, self.method), len(self.merged)
                step = WeightStep(method, self.values, self.state, arriving, before, notes, PART_BYTES)
                with of_tasks(*names):
                    entries = step.run()
            for name, line in left:
                logger.info("%s: %s", name, line)
            self._save(folder, tasks, tensors, entries, keep)

    def _opened(self, model: NewModel, ahead: int) -> tuple[Arriving, MergedTask]:
        """A model that fits, which so many others go ahead of, and its task as it is before the merge."""
        with of_tasks(model.name):
            tuned = FineTuned(model.folder, self.base, self.task, self.vocabulary, self.base_folder)
            left = tuned.left(self.method.merges(), self.values)
            left += differing_preparation(Path(self.base_folder or ""), model.folder)
            own = own_head(tuned.head(self.values), None, tuned.labels)
            self.task.check_head(own)
        labels = None if own.labels is None else list(own.labels)
        head = dict(own.tensors), dict(own.shared)
        task = MergedTask(model.name, 0, None, left, labels, None, model_name(model.folder), *head)
        return Arriving(model.name, tuned, self.step_seed(ahead)), task

    def _with_experts(
        self, folder: Path, model: Arriving, task: MergedTask, notes: Journal
    ) -> Mapping[str, Tensor]:
        """The tensors of a task's experts; the task learns why there are none."""
        method, experts = cast(GatedMethod, self.method), self._experts(folder)
        with of_tasks(model.name):
            made = ExpertStep(method, self.values, experts, *model, len(self.merged), notes, PART_BYTES).run()
        task.skipped, task.notes = made.skipped, [*made.notes, *task.notes]
        return made.tensors

    @classmethod
    def from_pretrained(cls, folder: Path, adapt: Mapping[str, Any] | None = None) -> Self:
        """The merger of a folder that holds a merge, whatever has written it.

        Args:
            folder: the folder.
            adapt: see `mingle.Merger.from_pretrained`.

        Raises:
            CheckpointError: as `mingle.Merger.from_pretrained`.
        """
        saved = opened(folder, adapt=adapt)
        merger = cls._begun(saved.manifest, saved.base_folder(), None, None, folder / MANIFEST)
        merger.base_name = saved.base_name()
        saved.check_base(merger.base_hash)
        merger.metadata = saved.manifest["metadata"]
        merger.state, merger.entries = saved.state_files(), entries_of(saved.manifest["state"])
        merger.tasks = [entries_of(task["tensors"]) for task in saved.manifest["tasks"]]
        try:
            for task, files in zip(merger.merged, saved.task_files(), strict=True):
                own = {key: files[key] for key in files if is_own(key)}
                task.take(own, merger.task, merger.base)
                merger._check_task(files)
            merger._check_state()
        except ValueError as error:
            reason = f"the tensors do not fit the method {merger.method.name!r} with these options"
            raise CheckpointError(f"{folder}: {reason}: {error}") from error
        return merger

    def export(self, folder: Path, out: Path, task: str | None = None) -> None:
        """Write the merged model, or that of one task, as a plain one; see `mingle.Merger.export`.

        Args:
            folder: the merger's.
            out: a new or an empty folder.
            task: see `mingle.Merger.export`; the task's own expert has a gate of 1, and the others of 0.

        Raises:
            ValueError, CheckpointError: as there.
        """
        method, owned = self.method, any(each.tensors for each in self.merged)
        exports.check(task, "transformers", seeds=False)
        exports.check_task(method, task, self.task_names, owned=owned)
        merged = Merged(self.base, self.base_folder, self.base_name, method, self._described())
        head = self.merged[self._place(task)].head if task is not None else Head({}, {})
        if head.tensors:
            merged = replace(merged, head=dict(head.tensors), labels=names_of(head))
        by_task = None
        weights: Fold | Mapping[str, Tensor] = self.state
        if isinstance(method, GatedMethod):
            if task is None and getattr(method.options, "gates", None) != "static":
                MergeMethod.plain_tower(method)  # which says what to do instead
            experts, gates = self._experts(folder), None
            if task is not None:
                gates = self._own_gates(task)
                by_task = gates.double().unsqueeze(1).expand(-1, len(method.layers))
            weights = Fold(method, experts, gates)
        elif task is not None and not owned:
            method.folded(self._place(task), None)  # which refuses
        inside = self.task.tower(self.base)
        state = PlainModel(self.base, self.values, f"{inside}." if inside else "", weights, head.tensors)
        if task is None or by_task is None:
            exports.write_plain(out, merged, state)
        else:
            exports.write_constant(out, merged, task, state, by_task)

    def exportable(self) -> bool:
        """Whether `export` can write the tensors one by one, under the names that the base's files have."""
        try:
            names = set(InFiles(self.base, Joined(self.values, names=set(first_names(self.base).values()))))
        except ValueError:
            return False
        return names <= self.values.files() | set(absent(self.base))

    def _own_gates(self, task: str) -> Tensor:
        """The gates [T] of all experts that let the task's own work alone; all 0 if it was skipped."""
        having = [each.name for each in self.merged if each.skipped is None]
        return torch.tensor([float(name == task) for name in having])

    def _identity(self, models: Sequence[NewModel]) -> str:
        """All that a step's result depends on."""
        merged = [entry["sha256"] for entries in (self.entries, *self.tasks) for entry in entries]
        arriving = [[model.name, model.digest] for model in models]
        facts = {"models": arriving, "base": self.base_hash, "merged": merged, "part": PART_BYTES}
        return journal.identity(self._described() | facts | {"versions": versions()})

    def _experts(self, folder: Path) -> list[PartFiles]:
        """The files of those tasks that have experts."""
        every = [PartFiles(folder, entries) for entries in self.tasks]
        return [files for files in every if not all(map(is_own, files))]

    def _check_task(self, files: PartFiles) -> None:
        found = sorted(key for key in files if not is_own(key))
        if isinstance(self.method, GatedMethod) and found:
            check_experts(self.method, files, found)
        elif found:
            raise ValueError(f"there is no place for {found[0]!r}")

    def _check_state(self) -> None:
        if isinstance(self.method, GatedMethod):
            if left := sorted(self.state):
                raise ValueError(f"there is no place for {left[0]!r}")
            return
        method = cast(TensorMethod, self.method)
        expected = {f"merged/{name}" for name in method.base} if self.merged else set()
        if missing := sorted(expected - self.state.keys()):
            raise ValueError(f"{missing[0]!r} is missing")

    def _save(
        self,
        folder: Path,
        tasks: Sequence[MergedTask],
        tensors: Mapping[str, Tensor],
        entries: list[dict[str, Any]],
        keep: int | None,
    ) -> None:
        """Save with tasks that are merged now; `tensors` are the first one's experts, where it has some."""
        for task in tasks:
            self.merged.append(task)
            for rows in (self.matrix, self.unknown):
                rows.append([None] * len(self.merged))
        before, self.answers = self.answers, {}
        try:
            manifest = merger_folder.save(
                folder,
                self._described() | {"metadata": self.metadata},
                self.base_hash,
                self.base_name,
                self._base_model(),
                [*self.tasks, *(Joined(tensors, task.kept()) for task in tasks)],
                entries,
                keep,
            )
        except BaseException:
            self.answers = before
            for each in (self.merged, self.matrix, self.unknown):
                del each[-len(tasks) :]
            raise
        self.state, self.entries = PartFiles(folder, entries), entries
        self.tasks = [entries_of(each["tensors"]) for each in manifest["tasks"]]
