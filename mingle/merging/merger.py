"""`Merger`: takes in fine-tuned models one after another and keeps one model that serves all their tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle import ranks
from mingle.adaptation.trace import StepProgress
from mingle.io import adapters_folder, merger_folder
from mingle.io.manifest import MANIFEST
from mingle.merging import adapters, addition, exports, removal
from mingle.merging.evaluate import Result, accuracies, accuracy
from mingle.merging.exports import Format, Merged
from mingle.merging.finetuned import Model
from mingle.merging.finite import refuse_non_finite
from mingle.merging.opened import check_known, opened
from mingle.merging.predict import AllTasks, Prediction
from mingle.merging.state import MergeState
from mingle.methods import StepReport
from mingle.methods.gated import GatedMethod
from mingle.tasks import TaskData, TaskType
from mingle.tasks.data import class_names_of
from mingle.tasks.heads import Head, head_of, names_of

logger = logging.getLogger(__name__)


class Merger(MergeState):
    """Merges fine-tuned models into one, in the order in which they arrive.

        merger = mingle.Merger("clip-vit-base-patch32", method="mingle")
        merger.add("svhn", "clip-vit-base-patch32_svhn", {"pixel_values": pixels, "text_embeds": head})
        merger.save_pretrained("merged")                       # and next month:
        merger = mingle.Merger.from_pretrained("merged")
        merger.add("gtsrb", "clip-vit-base-patch32_gtsrb", ...)

    Args:
        base_model: the common pre-trained model, a module or a local folder in hub format.  A module is
            copied, never changed.
        method: a name in `mingle.methods.METHODS`.
        task_type: how batches become logits: a name that `mingle.tasks.get` knows, such as ``"causal-lm"``,
            or an object of your own; None goes by the base's configuration and its head.
        seed: of everything random.  Step t depends only on (seed, t) and the merged state, so an interrupted
            merge resumes bit for bit.
        device: where the merged model lives; None leaves it where the base is.
        vocabulary: what fine-tuned models with new tokens get: ``same`` refuses them, ``base`` merges the
            rows of embeddings and head that the base has too, and tells what is lost.
        dtype: of the base, the merged model and the teacher: ``float32``, ``bfloat16`` or ``float16``; None
            leaves a module's, and is float32 for a folder.  Gates, and what is summed up over tasks, stay in
            float32.
        options: the method's own, see its ``Options``.

    Raises:
        ValueError: an unknown method, task type, option, vocabulary or dtype; a base with NaN or infinite
            weights.
        CheckpointError: a folder that does not hold an intact model.
    """

    def add(
        self,
        name: str,
        finetuned_model: Model,
        seed_data: TaskData | Mapping[str, Any] | None = None,
        on_step: Callable[[StepProgress], None] | None = None,
    ) -> StepReport:
        """Merge one more fine-tuned model.

        Args:
            name: the task's name, new to this merger.
            finetuned_model: a module, a state dict or a local folder; the whole model, its tower alone, or a
                folder with a LoRA adapter.
            seed_data: a few unlabelled samples of the task; see the task type for the keys.  Methods that
                adapt need them; with any method they tell tasks apart in `predict`.
            on_step: called during adaptation, see `mingle.adaptation.train.adapt_gates`.

        Raises:
            ValueError: a name that is taken, missing seed samples, or a model that is not a fine-tuned
                version of the base.
            CheckpointError: a broken checkpoint, or one with NaN or infinite weights.
            AdaptationDiverged: the loss stayed non-finite.
            NonFiniteMerge: the method's result is not finite.

        Of several processes all call this, with the same arguments; they share the work, see `mingle.ranks`,
        and have the same merger afterwards.  What one of them raises, all raise: the others as
        `mingle.ranks.OtherRankFailed`.

        Whatever is raised, the merger is as it was before; after `NonFiniteMerge`, and after an error of the
        model with the samples, `model` is another module with the same weights.
        """
        return addition.add(self, name, finetuned_model, seed_data, on_step)

    def remove(self, name: str) -> list[str]:
        """Take a merged task out again.

        Experts, gates and statistics of all other tasks stay bit for bit, and so do their places in the
        order.  Accuracies of the model as it is now are to be measured again, unless the task was the last to
        arrive and left nothing behind.  `model` is another module afterwards.

        Args:
            name: of the task.

        Returns:
            What of the task stays in what the others have, in words: later gates, for instance, learned
            beside it.  Nothing where the model is that of a merge that never had the task; it always is where
            the task was the only one.

        Raises:
            ValueError: a task that is not merged; or a method that keeps a sum of all tasks, which does not
                tell them apart, see `mingle.methods.MergeMethod.without`.  The merger is as it was before.
        """
        return removal.remove(self, name)

    def set_classes(
        self,
        name: str,
        class_names: Sequence[str] | None = None,
        shared: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Say what the classes of a merged task are, where it was merged without samples that say so.

        Args:
            name: the task.
            class_names: the names of its classes by number; None leaves those that there are.
            shared: what its samples share, such as their ``text_embeds``; None leaves what there is.

        Raises:
            ValueError: a task that is not merged, or classes that do not fit its head.
        """
        task = self.merged[self._place(name)]
        kept = task.head
        names = class_names_of({"class_names": class_names})
        head = Head(kept.tensors, dict(shared or kept.shared), names or kept.labels)
        if unknown := [key for key in head.shared if key not in self.task.shared]:
            raise ValueError(f"{unknown[0]!r} is nothing that the samples of a {self.task.name} task share")
        self.task.check_head(head)
        task.labels = None if head.labels is None else list(head.labels)
        task.shared = dict(head.shared)

    def model_for(self, name: str) -> nn.Module:
        """The model that serves a merged task.

        It is the merged model, with the task's own head where tasks have heads; or, for the reference row
        ``individual``, the task's own model.
        """
        place = self._place(name)
        self.method.select(place)
        self._put_head(place)
        return self.model

    def predict(self, inputs: TaskData | Mapping[str, Any], batch_size: int = 128) -> Prediction:
        """Answer samples among the classes of all merged tasks, whichever of the tasks they are of.

        Where the method has a router, as `routed` has, it finds the task.  With others the answer is the
        class of the greatest probability over all tasks, see `mingle.merging.calibration`.

        Args:
            inputs: samples as the task type takes them; of what they share, such as ``text_embeds``, nothing
                is needed.
            batch_size: samples per batch.

        Raises:
            ValueError: answers that are not classes, a method that keeps one model per task, or tasks whose
                classes are not known; the message says what to do.
        """
        return self._all_tasks().predict(inputs, batch_size)

    def evaluate(
        self,
        suite: Mapping[str, TaskData | Mapping[str, Any]],
        batch_size: int = 128,
        tasks: Collection[str] | None = None,
    ) -> Result:
        """Accuracy on every merged task, or on some of them, kept as the last row of the accuracy matrices.

        Where `predict` has an answer, it is measured too how often task and class are both right.  Of several
        processes all call this; each takes some of the batches, and all have the result of a single one.

        Args:
            suite: labelled test samples by task name; a `mingle.suites.Suite` or any mapping that has the
                merged tasks.
            batch_size: samples per batch.  With ``batch`` gates predictions depend on it.
            tasks: which merged tasks to measure; None measures all.

        Returns:
            Everything measured so far, with `.acc`, `.acc_unknown`, `.bwt` and `.matrix`.
        """
        wanted = self.task_names if tasks is None else tasks
        missing = [name for name in wanted if name not in suite]
        if missing:
            raise ValueError(f"the suite has no samples for the merged tasks {', '.join(missing)}")
        everything = self._all_tasks()
        separable = not everything.hindrance()
        rows: tuple[list[float | None], list[float | None]] = ([], [])
        answers = {}
        for place, name in enumerate(self.task_names):
            known = unknown = None
            if name in wanted:
                with ranks.together(f"evaluating task {name!r}"):
                    model = self.model_for(name)
                    data = self.task.samples(model, suite[name])
                    if separable and data.metric == "accuracy":
                        known, unknown, answers[name] = accuracies(everything, place, model, data, batch_size)
                    else:
                        known = accuracy(self.task, model, data, batch_size)
            rows[0].append(known)
            rows[1].append(unknown)
        if self.merged:
            self.matrix[-1], self.unknown[-1] = rows
            self.answers = answers
        return self.result()

    def save_pretrained(
        self, folder: str | Path, *, include_base: bool = True, keep: int | None = None
    ) -> None:
        """Write the merger to a folder: safetensors and a JSON manifest, nothing pickled.

        Files are written beside the old ones and the manifest last, so an interruption leaves the old state
        or the new one.  Only what changed since the last save to the same folder is written.  What was saved
        there before stays as an earlier generation, see ``mingle rollback`` and ``mingle tidy``.  Of several
        processes the first one writes, and all wait for it.

        Args:
            folder: created if it does not exist.
            include_base: put the base model into the folder too, which makes it self-contained; without it,
                `from_pretrained` needs `base`.
            keep: how many generations the folder keeps from now on, the newest ones; None leaves it at what
                was said before, at first all.

        Raises:
            ValueError: `keep` less than 1.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: expected 1 or more, the generation that is saved")
        with ranks.together(f"saving to {folder}"):
            task_tensors = self._kept()
            refuse_non_finite(self.method, self.task_names[-1] if self.merged else "none", task_tensors)
            base = self._base_model() if include_base else None
            merger_folder.save(
                Path(folder),
                self._described() | {"metadata": self.metadata},
                self.base_hash,
                self.base_name,
                base,
                task_tensors,
                self.method.state_tensors(),
                keep,
            )

    def export(
        self,
        folder: str | Path,
        task: str | None = None,
        format: Format = "transformers",
        seed_data: TaskData | Mapping[str, Any] | None = None,
    ) -> None:
        """Write the merged model to a new folder for other programs, with a model card.

        ``transformers``: a plain Hugging Face model, which `from_pretrained` loads.  Of a method with gates
        it is a model for one task alone: the experts are folded into the weights, with the means of the
        gates over `seed_data`; without these, and for ``routed``, the task's own expert has a gate of 1, and
        the others of 0.

        ``peft``: a LoRA adapter per task for the untouched base, in PEFT's layout, and beside them the router
        and whatever else `from_adapters` needs to go on merging.

        Of several processes the first one writes, and all wait for it.

        Args:
            folder: a folder that does not exist yet or is empty.
            task: whose model to write, for methods with gates, for classifiers, of which each has its own
                head, and for the reference row ``individual``, which has one model per task.
            format: ``transformers`` or ``peft``.
            seed_data: a few unlabelled samples of the task.

        Raises:
            ValueError: a method whose model is not plain weights, see
                `mingle.methods.MergeMethod.plain_tower`, or that has no adapters, see
                `mingle.methods.MergeMethod.adapter`; a task that is not merged, is missing, or is given where
                one model serves all; another format.
            CheckpointError: a folder in use, or a full disk.
        """
        with ranks.together(f"exporting to {folder}"):
            if ranks.rank() == 0:
                with ranks.apart():
                    self._export(Path(folder), task, format, seed_data)

    def _export(
        self,
        folder: Path,
        task: str | None,
        format: Format,
        seed_data: TaskData | Mapping[str, Any] | None,
    ) -> None:
        method, owned = self.method, any(task.tensors for task in self.merged)
        exports.check(task, format, seeds=seed_data is not None)
        merged = Merged(self.base, self.base_folder, self.base_name, method, self._described())
        if format == "peft":
            heads = [each.tensors for each in self.merged]
            exports.write_adapters(folder, merged, self._kept(), heads)
            return
        exports.check_task(method, task, self.task_names, owned=owned)
        if task is not None:
            self.model_for(task)
            if owned:
                head = self.merged[self._place(task)].head
                merged = replace(merged, head=head_of(self.model, head.tensors), labels=names_of(head))
        if task is None or (not isinstance(method, GatedMethod) and (method.per_task or owned)):
            exports.write_plain(folder, merged)
            return
        samples = None
        if seed_data is not None and method.folds_by_means:
            samples = self.task.samples(self.model, seed_data)
            if method.needs_answers:
                samples = self.task.prepared(lambda: self.model, samples)
        exports.write_folded(folder, merged, task, samples)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: nn.Module | str | Path | None = None,
        *,
        task_type: TaskType | None = None,
        device: str | torch.device | None = None,
        adapt: Mapping[str, Any] | None = None,
    ) -> Merger:
        """The merger that `save_pretrained` wrote.

        The next `add` gives the same bits as if the merger had never been saved and loaded.

        Args:
            folder: the folder that `save_pretrained` wrote.  Nothing outside it is read.
            base: the base model, where the folder does not hold it.
            task_type: the object, where it is of your own and not registered, see `mingle.tasks.register`.
            device: where the merged model lives.
            adapt: options of the adaptation (``steps``, ``lr``, ``batch_size``, ``micro_batch_size``,
                ``temperature``) that change from now on; tasks that are merged stay as they are.

        Raises:
            CheckpointError: a missing, truncated or changed file, another format version, or another base
                model.
            ValueError: an option that is not one of the adaptation's, or that the method does not have.
        """
        folder = Path(folder)
        saved = opened(folder, task_type, adapt)
        model = base if base is not None else saved.base_folder()
        merger = cls._begun(saved.manifest, model, task_type, device, folder / MANIFEST)
        if base is None:
            merger.base_name = saved.base_name()
        saved.check_base(merger.base_hash)
        merger._restore(saved.task_files(), saved.state_tensors(), folder)
        merger.metadata = saved.manifest["metadata"]
        return merger

    @classmethod
    def from_adapters(
        cls,
        base: nn.Module | str | Path,
        folder: str | Path,
        *,
        task_type: TaskType | None = None,
        device: str | torch.device | None = None,
    ) -> Merger:
        """The merger whose adapters `export` wrote with the format ``peft``; only `metadata` is not there.

        The next `add` gives the same bits as if the merger had never been exported.

        Args:
            base: the base model that the adapters are for, a module or a local folder.
            folder: the folder that `export` wrote.  Nothing outside it is read.
            task_type: as for `from_pretrained`.
            device: where the merged model lives.

        Raises:
            CheckpointError: adapters that are not such an export; a missing, truncated or changed file,
                another format version, or another base model.
        """
        folder = Path(folder)
        exported = adapters_folder.load(folder)
        check_known(exported.description, exported.path, task_type)
        merger = cls._begun(exported.description, base, task_type, device, exported.path)
        exported.check_base(merger.base_hash)
        merger._restore(*adapters.tensors_in(exported, merger.task, merger.base), folder)
        return merger

    def _all_tasks(self) -> AllTasks:
        heads = [task.head for task in self.merged]
        temperatures = [task.temperature for task in self.merged]
        return AllTasks(self.task, self.method, self.task_names, heads, temperatures)
