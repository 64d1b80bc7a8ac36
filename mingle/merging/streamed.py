"""Merges from folder to folder that never have more than one tensor of a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.io import journal, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.journal import PartFiles
from mingle.io.lazy_tensors import Joined
from mingle.io.manifest import MANIFEST, entries_of
from mingle.io.provenance import versions
from mingle.io.state_dicts import IncompatibleModel, first_names
from mingle.merging import exports
from mingle.merging.base_in_files import BaseInFiles, stored_buffers
from mingle.merging.exports import Merged
from mingle.merging.finetuned import FineTuned
from mingle.merging.merged_task import MergedTask, is_own, own_head
from mingle.merging.opened import opened
from mingle.merging.state import model_name
from mingle.merging.streamed_experts import ExpertStep, Made, check_experts
from mingle.merging.streamed_export import Fold, PlainModel
from mingle.merging.streamed_weights import WeightStep
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
    return (plain or gated) and task.loads_as_stored and not stored_buffers(base)


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
                made, entries = Made({}, None, []), self.entries
                of_step = name, tuned, self.step_seed(), len(self.merged), notes, PART_BYTES
                if isinstance(self.method, GatedMethod):
                    experts = self._experts(folder)
                    made = ExpertStep(self.method, self.values, experts, *of_step).run()
                else:
                    method = cast(TensorMethod, self.method)
                    entries = WeightStep(method, self.values, self.state, *of_step).run()
            except (IncompatibleModel, CheckpointError) as error:
                raise type(error)(f"task {name!r}: {error}") from None
            for line in left:
                logger.info("%s: %s", name, line)
            labels = None if own.labels is None else list(own.labels)
            told = [*made.notes, *left]
            called = model_name(model)
            task = MergedTask(
                name, 0, made.skipped, told, labels, None, called, dict(own.tensors), dict(own.shared)
            )
            self._save(folder, task, made.tensors, entries, keep)

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

    def _identity(self, name: str, digest: str) -> str:
        """All that a step's result depends on."""
        merged = [entry["sha256"] for entries in (self.entries, *self.tasks) for entry in entries]
        facts = {"name": name, "model": digest, "base": self.base_hash, "merged": merged, "part": PART_BYTES}
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
        task: MergedTask,
        tensors: Mapping[str, Tensor],
        entries: list[dict[str, Any]],
        keep: int | None,
    ) -> None:
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
                [*self.tasks, Joined(tensors, task.kept())],
                entries,
                keep,
            )
        except BaseException:
            self.answers = before
            for each in (self.merged, self.matrix, self.unknown):
                each.pop()
            raise
        self.state, self.entries = PartFiles(folder, entries), entries
        self.tasks = [entries_of(each["tensors"]) for each in manifest["tasks"]]
