"""`Merger`: takes in fine-tuned models one after another and keeps one model that serves all their tasks."""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle import methods, tasks
from mingle.adaptation.trace import StepProgress
from mingle.io import adapters_folder, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.hub import ModelName
from mingle.io.manifest import MANIFEST
from mingle.io.state_dicts import IncompatibleModel, non_finite
from mingle.merging import adapters, exports
from mingle.merging.evaluate import Result, accuracy
from mingle.merging.exports import Format, Merged
from mingle.merging.finetuned import FineTuned, Model
from mingle.merging.finite import NonFiniteMerge, refuse_non_finite
from mingle.merging.opened import check_known, opened, restore
from mingle.methods import Arrival, MergeMethod, StepReport
from mingle.options import build
from mingle.tasks import TaskData, TaskType
from mingle.tasks.heads import head_of, put_head
from mingle.tasks.image_settings import differing_preparation

logger = logging.getLogger(__name__)

#: before the names of a head's tensors in a task's file
_HEAD = "head/"


@dataclass
class MergedTask:
    """One task that the merged model serves.

    Attributes:
        name: the task's name.
        seed_samples: how many seed samples it was merged with.
        skipped: why nothing was merged, or None.
        notes: things worth telling, such as a saturated basis.
    """

    name: str
    seed_samples: int = 0
    skipped: str | None = None
    notes: list[str] = field(default_factory=list)


class Merger:
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
        options: the method's own, see its ``Options``.

    Raises:
        ValueError: an unknown method, task type or option; a base with NaN or infinite weights.
        CheckpointError: a folder that does not hold an intact model.
    """

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        method: str = "mingle",
        task_type: str | TaskType | None = None,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        self.task = _task_type(task_type, base_model)
        method_class = methods.get(method)
        self.options: Any = build(method_class.Options, options, f"method {method!r}")
        self.seed = seed
        self.base_folder = None if isinstance(base_model, nn.Module) else Path(base_model)
        self.base_name = _name(base_model)
        self.base = _finite(base_model) if isinstance(base_model, nn.Module) else self.task.load(base_model)
        if device is not None:
            self.base = copy.deepcopy(self.base).to(device)
        tower = self.base.get_submodule(self.task.tower(self.base))
        self._base_tower = {name: tensor.detach() for name, tensor in tower.state_dict().items()}
        self._begin(method_class)
        self.merged: list[MergedTask] = []
        #: what each task has of its own, such as a classifier's head, by names in the model
        self.heads: list[dict[str, torch.Tensor]] = []
        self.matrix: list[list[float | None]] = []
        #: anything JSON can hold, saved with the merger
        self.metadata: dict[str, Any] = {}

    @property
    def task_names(self) -> list[str]:
        """The merged tasks in order of arrival."""
        return [task.name for task in self.merged]

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
            seed_data: a few unlabelled samples of the task, for methods that adapt (others never look at
                them); see the task type for the keys.
            on_step: called during adaptation, see `mingle.adaptation.train.adapt_gates`.

        Raises:
            ValueError: a name that is taken, missing seed samples, or a model that is not a fine-tuned
                version of the base.
            CheckpointError: a broken checkpoint, or one with NaN or infinite weights.
            AdaptationDiverged: the loss stayed non-finite.
            NonFiniteMerge: the method's result is not finite.

        Whatever is raised, the merger is as it was before; after `NonFiniteMerge`, `model` is another module
        with the same weights.
        """
        self.check_name(name)
        seeds = self.task.data(seed_data) if seed_data is not None and self.method.needs_seeds else None
        if self.method.needs_seeds and not seeds:
            raise ValueError(
                f"task {name!r}: method {self.method.name!r} needs seed samples, and none were given"
            )
        try:
            model = FineTuned(finetuned_model, self.base, self.task)
            tuned, head, left = model.tensors(), model.head(), model.left(self.method.merges())
            left += self._prepared_otherwise(finetuned_model)
        except (IncompatibleModel, CheckpointError) as error:
            raise type(error)(f"task {name!r}: {error}") from None
        index = len(self.merged)
        teacher = partial(self._teacher, tuned, head)
        if seeds is not None and self.method.needs_answers:
            seeds = self.task.prepared(teacher, seeds)
        arrival = Arrival(
            index=index,
            name=name,
            tuned=tuned,
            seeds=seeds,
            teacher=teacher,
            seed=zlib.crc32(f"{self.seed}/{index}".encode()),
            on_step=on_step,
        )
        before = [self.method.task_tensors(i) for i in range(index)], self.method.state_tensors()
        served = head_of(self.model, head)
        put_head(self.model, head)
        try:
            report = self.method.add(arrival)
        except BaseException:
            put_head(self.model, served)
            raise
        try:
            refuse_non_finite(self.method, name, [self.method.task_tensors(index)])
        except NonFiniteMerge:
            self._begin(type(self.method))
            self.method.restore(*before)
            put_head(self.model, served)
            raise
        for line in left:
            logger.info("%s: %s", name, line)
        report.notes += left
        self.merged.append(MergedTask(name, len(seeds) if seeds else 0, report.skipped, report.notes))
        self.matrix.append([None] * len(self.merged))
        self.heads.append(head)
        return report

    def check_name(self, name: str) -> None:
        """Raise `ValueError` for a name that a further task cannot have."""
        if not name or name in self.task_names:
            raise ValueError(f"task {name!r} is already merged" if name else "a task needs a name")

    def model_for(self, name: str) -> nn.Module:
        """The model that serves a merged task.

        It is the merged model, with the task's own head where tasks have heads; or, for the reference row
        ``individual``, the task's own model.
        """
        if name not in self.task_names:
            raise ValueError(
                f"task {name!r} is not among the merged ones: {', '.join(self.task_names) or 'none'}"
            )
        place = self.task_names.index(name)
        self.method.select(place)
        put_head(self.model, self.heads[place])
        return self.model

    def evaluate(
        self,
        suite: Mapping[str, TaskData | Mapping[str, Any]],
        batch_size: int = 128,
        tasks: Collection[str] | None = None,
    ) -> Result:
        """Accuracy on every merged task, or on some of them, kept as the last row of the accuracy matrix.

        Args:
            suite: labelled test samples by task name; a `mingle.suites.Suite` or any mapping that has the
                merged tasks.
            batch_size: samples per batch.  With ``batch`` gates predictions depend on it.
            tasks: which merged tasks to measure; None measures all.

        Returns:
            Everything measured so far, with `.acc`, `.bwt` and `.matrix`.
        """
        wanted = self.task_names if tasks is None else tasks
        missing = [name for name in wanted if name not in suite]
        if missing:
            raise ValueError(f"the suite has no samples for the merged tasks {', '.join(missing)}")
        row: list[float | None] = [
            accuracy(self.task, self.model_for(name), self.task.data(suite[name]), batch_size)
            if name in wanted
            else None
            for name in self.task_names
        ]
        if row:
            self.matrix[-1] = row
        return self.result()

    def result(self) -> Result:
        """Everything measured so far."""
        return Result(self.task_names, [list(row) for row in self.matrix])

    def save_pretrained(self, folder: str | Path, *, include_base: bool = True) -> None:
        """Write the merger to a folder: safetensors and a JSON manifest, nothing pickled.

        Files are written beside the old ones and the manifest last, so an interruption leaves the old state
        or the new one.  Only what changed since the last save to the same folder is written.

        Args:
            folder: created if it does not exist.
            include_base: put the base model into the folder too, which makes it self-contained; without it,
                `from_pretrained` needs `base`.
        """
        task_tensors = self._kept()
        refuse_non_finite(self.method, self.task_names[-1] if self.merged else "none", task_tensors)
        base = merger_folder.BaseModel(self.base, self.base_folder) if include_base else None
        merger_folder.save(
            Path(folder),
            self._described() | {"metadata": self.metadata},
            merger_folder.state_hash(self.base),
            self.base_name,
            base,
            task_tensors,
            self.method.state_tensors(),
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

        Args:
            folder: a folder that does not exist yet or is empty.
            task: whose model to write, for methods with gates and for the reference row ``individual``.
            format: ``transformers`` or ``peft``.
            seed_data: a few unlabelled samples of the task.

        Raises:
            ValueError: a method whose model is not plain weights, see
                `mingle.methods.MergeMethod.plain_tower`, or that has no adapters, see
                `mingle.methods.MergeMethod.adapter`; a task that is not merged, is missing, or is given where
                one model serves all; another format.
            CheckpointError: a folder in use, or a full disk.
        """
        folder, method = Path(folder), self.method
        exports.check(task, format, seeds=seed_data is not None)
        head = {} if task is None or task not in self.task_names else self.heads[self.task_names.index(task)]
        merged = Merged(self.base, self.base_folder, self.base_name, method, self._described(), head)
        if format == "peft":
            exports.write_adapters(folder, merged, self._kept())
            return
        if method.per_task and task is None:
            known = ", ".join(self.task_names)
            raise ValueError(f"method {method.name!r} keeps one model per task; name one of {known}")
        if task is not None:
            self.model_for(task)
        if task is None or method.per_task:
            exports.write_plain(folder, merged)
        else:
            samples = None
            if seed_data is not None and method.folds_by_means:
                samples = self.task.data(seed_data)
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
    ) -> Merger:
        """The merger that `save_pretrained` wrote.

        The next `add` gives the same bits as if the merger had never been saved and loaded.

        Args:
            folder: the folder that `save_pretrained` wrote.  Nothing outside it is read.
            base: the base model, where the folder does not hold it.
            task_type: the object, where it is of your own and not registered, see `mingle.tasks.register`.
            device: where the merged model lives.

        Raises:
            CheckpointError: a missing, truncated or changed file, another format version, or another base
                model.
        """
        folder = Path(folder)
        saved = opened(folder, task_type)
        model = base if base is not None else saved.base_folder()
        merger = cls._opened(saved.manifest, model, task_type, device, folder / MANIFEST)
        if base is None:
            merger.base_name = saved.base_name()
        saved.check_base(merger_folder.state_hash(merger.base))
        merger._restore(saved.task_tensors(), saved.state_tensors(), folder)
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
        merger = cls._opened(exported.description, base, task_type, device, exported.path)
        exported.check_base(merger_folder.state_hash(merger.base))
        merger._restore(*adapters.tensors_in(exported, merger.task.tower(merger.base)), folder)
        return merger

    @classmethod
    def _opened(
        cls,
        merge: Mapping[str, Any],
        base: nn.Module | str | Path,
        task_type: TaskType | None,
        device: str | torch.device | None,
        path: Path,
    ) -> Merger:
        """The merger that the file at `path` describes, without the tensors of its tasks."""
        task, model = task_type or tasks.get(merge["task_type"]), base
        if not isinstance(model, nn.Module):
            model = task.load(model).to(getattr(torch, merge["dtype"]))
        try:
            merger = cls(model, merge["method"], task, seed=merge["seed"], device=device, **merge["options"])
        except ValueError as error:  # options that do not suit this model
            raise CheckpointError(f"{path}: {error}") from error
        if not isinstance(base, nn.Module):
            merger.base_folder, merger.base_name = Path(base), _name(base)
        merger.merged = [
            MergedTask(**{key: task[key] for key in MergedTask.__dataclass_fields__})
            for task in merge["tasks"]
        ]
        merger.matrix = merge["matrix"]
        return merger

    def _restore(
        self, saved: list[dict[str, torch.Tensor]], state: dict[str, torch.Tensor], folder: Path
    ) -> None:
        """Take on what `_kept` gave of each task, and the state of the method."""
        place = next(self.base.parameters()).device
        moved = [{name: tensor.to(place) for name, tensor in tensors.items()} for tensors in saved]
        self.heads = [
            {name.removeprefix(_HEAD): tensor for name, tensor in tensors.items() if name.startswith(_HEAD)}
            for tensors in moved
        ]
        own = [{name: t for name, t in tensors.items() if not name.startswith(_HEAD)} for tensors in moved]
        state = {name: tensor.to(place) for name, tensor in state.items()}
        restore(self.method, own, state, self.heads[-1] if self.heads else {}, folder)

    def _kept(self) -> list[dict[str, torch.Tensor]]:
        """All that is kept of each task alone: what the method keeps, and the task's head."""
        return [
            self.method.task_tensors(i) | {f"{_HEAD}{name}": tensor for name, tensor in head.items()}
            for i, head in enumerate(self.heads)
        ]

    def _described(self) -> dict[str, Any]:
        """What a saved merge says of itself, in the form of `mingle.io.manifest.MERGE`."""
        return {
            "method": self.method.name,
            "task_type": self.task.name,
            "seed": self.seed,
            "dtype": str(next(self.base.parameters()).dtype).removeprefix("torch."),
            "options": asdict(self.options),
            "tasks": [asdict(task) for task in self.merged],
            "matrix": self.matrix,
        }

    def _prepared_otherwise(self, model: Model) -> list[str]:
        if self.base_folder is None or isinstance(model, nn.Module | Mapping):
            return []
        return differing_preparation(self.base_folder, Path(model))

    def _begin(self, method: type[MergeMethod]) -> None:
        """Set up a merged model into which nothing is merged yet."""
        self.model = copy.deepcopy(self.base).eval()
        self.method = method(self.model, self.task, self._base_tower, self.options)

    def _teacher(self, tuned: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]) -> nn.Module:
        teacher = copy.deepcopy(self.base).eval()
        put_head(teacher, head)
        teacher.get_submodule(self.task.tower(teacher)).load_state_dict(dict(tuned))
        return teacher


def _name(base: nn.Module | str | Path) -> ModelName:
    """What the base is called; a module may say so in its configuration."""
    place: Any = (
        getattr(getattr(base, "config", None), "name_or_path", "") if isinstance(base, nn.Module) else base
    )
    return ModelName.of(place) if place else ModelName()


def _task_type(given: str | TaskType | None, base_model: nn.Module | str | Path) -> TaskType:
    if isinstance(given, TaskType):
        return given
    return tasks.of(base_model) if given is None else tasks.get(given)


def _finite(base: nn.Module) -> nn.Module:
    """The base, if it has no NaN or infinite weights; a folder's are looked at when it is loaded."""
    for name, tensor in base.state_dict().items():
        if found := non_finite(tensor):
            raise ValueError(f"the base: {name}: {found}")
    return base
