"""What a merger holds, how it is written, and how it comes back."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from mingle import methods, tasks
from mingle.io import merger_folder
from mingle.io.files import CheckpointError
from mingle.io.hub import ModelName
from mingle.io.lazy_tensors import OnDevice
from mingle.io.state_dicts import non_finite, state_hash
from mingle.merging.answers import Answers
from mingle.merging.evaluate import Result
from mingle.merging.merged_task import MergedTask, RemovedTask
from mingle.merging.vocabulary import Vocabulary, check_vocabulary
from mingle.methods import MergeMethod
from mingle.methods.base import SavedTasks, Tensors
from mingle.methods.gated import GatedMethod
from mingle.options import build, nearest
from mingle.tasks import TaskType
from mingle.tasks.heads import names_of, put_head, put_names
from mingle.tasks.loading import absent
from mingle.tasks.names import in_files
from mingle.tasks.precision import Precision, dtype_of, put_into

if TYPE_CHECKING:
    from mingle.merging.finetuned import FineTuned


class MergeState:
    """A base, the model merged so far, and what is known of its tasks; see `mingle.Merger`."""

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        method: str = "mingle",
        task_type: str | TaskType | None = None,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        vocabulary: Vocabulary = "same",
        dtype: Precision | None = None,
        **options: Any,
    ) -> None:
        check_vocabulary(vocabulary)
        precision = None if dtype is None else dtype_of(dtype)
        self.task = _task_type(task_type, base_model)
        method_class = methods.get(method)
        self.options: Any = build(method_class.Options, options, f"method {method!r}")
        self.seed, self.vocabulary = seed, vocabulary
        self.base_folder = None if isinstance(base_model, nn.Module) else Path(base_model)
        self.base_name = model_name(base_model)
        self.base = self._model_of(base_model)
        if precision is not None:
            own = copy.deepcopy(self.base) if isinstance(base_model, nn.Module) else self.base
            self.base = put_into(own, precision)
        if device is not None:
            self.base = copy.deepcopy(self.base).to(device)
        tower = self.base.get_submodule(self.task.tower(self.base))
        self._base_tower = {name: tensor.detach() for name, tensor in tower.state_dict().items()}
        self._begin(method_class)
        self.merged: list[MergedTask] = []
        #: tasks that left, where something of them is still in what the others have
        self.removed: list[RemovedTask] = []
        #: accuracies after every merge: where the task is known, and where it has to be found too
        self.matrix: list[list[float | None]] = []
        self.unknown: list[list[float | None]] = []
        #: what the samples of every task were taken for, as they were last measured; by the task's name
        self.answers: dict[str, Answers] = {}
        #: anything JSON can hold, saved with the merger
        self.metadata: dict[str, Any] = {}

    def _model_of(self, base: nn.Module | str | Path) -> nn.Module:
        """The base model."""
        return (
            _finite(self.task.base(base))
            if isinstance(base, nn.Module)
            else self._loaded(self.task, Path(base))
        )

    @property
    def base_hash(self) -> str:
        """The base's `mingle.io.state_dicts.state_hash`."""
        return state_hash(self.base)

    @classmethod
    def hash_of(cls, task: TaskType, folder: Path, dtype: Precision) -> str:
        """The same of the base that a folder holds."""
        return state_hash(put_into(cls._loaded(task, folder), dtype_of(dtype)))

    @staticmethod
    def _loaded(task: TaskType, folder: Path) -> nn.Module:
        """The base model in a folder."""
        return task.load(folder)

    @property
    def values(self) -> Mapping[str, torch.Tensor] | None:
        """The tensors of a base that is on the meta device; None where the base holds them itself."""
        return None

    def tuned_tensors(self, model: FineTuned) -> Mapping[str, torch.Tensor]:
        """The tensors of a fine-tuned tower, all found to be finite."""
        return model.tensors()

    def teacher(self, tuned: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]) -> nn.Module:
        """The fine-tuned model, whole."""
        teacher = copy.deepcopy(self.base).eval()
        put_head(teacher, head)
        teacher.get_submodule(self.task.tower(teacher)).load_state_dict(dict(tuned))
        return teacher

    def restorable(self) -> Callable[[], tuple[list[Tensors], Tensors]] | None:
        """What gives, after an error, all that the method restores; None where nothing can be restored."""
        state, known = self.method.state_tensors(), range(len(self.merged))

        def tasks() -> list[Tensors]:
            return [self.method.task_tensors(i) for i in known]

        # What stays as it is may be asked for later: kept until then, it would be in memory twice.
        before = tasks() if self.method.rewrites_tasks() else None
        return lambda: (tasks() if before is None else before, state)

    @property
    def task_names(self) -> list[str]:
        """The merged tasks in order of arrival."""
        return [task.name for task in self.merged]

    def step_seed(self, ahead: int = 0) -> int:
        """Of everything random when the next model arrives, or one that so many others go ahead of."""
        return zlib.crc32(f"{self.seed}/{len(self.merged) + ahead}".encode())

    def check_name(self, name: str) -> None:
        """Raise `ValueError` for a name that a further task cannot have."""
        if not name or name in self.task_names:
            raise ValueError(f"task {name!r} is already merged" if name else "a task needs a name")

    def result(self) -> Result:
        """Everything measured so far."""
        matrix, unknown = ([list(row) for row in rows] for rows in (self.matrix, self.unknown))
        return Result(self.task_names, matrix, unknown, dict(self.answers))

    def _place(self, name: str) -> int:
        """The number of a merged task; `ValueError` for any other."""
        if name not in self.task_names:
            raise ValueError(
                f"task {name!r} is not among the merged ones: {', '.join(self.task_names) or 'none'}"
                f"{nearest(name, self.task_names)}"
            )
        return self.task_names.index(name)

    def _put_head(self, place: int) -> None:
        """Put the head of a merged task into the model, and note the names of its classes there."""
        task = self.merged[place]
        put_head(self.model, task.tensors)
        if task.tensors and hasattr(self.model, "config") and (names := names_of(task.head)):
            put_names(self.model, names)

    def _begin(self, method: type[MergeMethod]) -> None:
        """Set up a merged model into which nothing is merged yet."""
        self.model = copy.deepcopy(self.base).eval()
        self.method = method(self.model, self.task, self._base_tower, self.options)

    def _described(self) -> dict[str, Any]:
        """What a saved merge says of itself, in the form of `mingle.io.manifest.MERGE`."""
        return {
            "method": self.method.name,
            "task_type": self.task.name,
            "seed": self.seed,
            "dtype": str(next(self.base.parameters()).dtype).removeprefix("torch."),
            "options": asdict(self.options),
            **({} if self.vocabulary == "same" else {"vocabulary": self.vocabulary}),
            "tasks": [task.noted() for task in self.merged],
            **({"removed": [asdict(task) for task in self.removed]} if self.removed else {}),
            "matrix": self.matrix,
            "unknown": self.unknown,
            **(
                {"answers": {name: each.noted() for name, each in self.answers.items()}}
                if self.answers
                else {}
            ),
        }

    def _kept(self) -> list[Tensors]:
        """All that is kept of each task alone: what the method keeps, and what the task has of its own."""
        return [self.method.task_tensors(i) | task.kept() for i, task in enumerate(self.merged)]

    def _base_model(self) -> merger_folder.BaseModel:
        """The base, to be written beside what is merged.

        Raises:
            CheckpointError: a module that does not know how it is described.
        """
        if self.base_folder is not None:
            return merger_folder.BaseModel(self.base_folder)
        files = self.task.files(self.base)
        if not files:
            raise CheckpointError(
                f"the base {type(self.base).__name__} has no config to save it with; use include_base=False "
                "and give the base to from_pretrained"
            )
        lacking = absent(self.base)
        held = {name: tensor for name, tensor in self.base.state_dict().items() if name not in lacking}
        return merger_folder.BaseModel(None, files, partial(in_files, self.base, held))

    @classmethod
    def _begun(
        cls,
        merge: Mapping[str, Any],
        base: nn.Module | str | Path,
        task_type: TaskType | None,
        device: str | torch.device | None,
        path: Path,
    ) -> Self:
        """The merger that a file describes, without the tensors of its tasks.

        Args:
            merge: what `_described` gave.
            base, task_type, device: see `mingle.Merger.from_pretrained`.
            path: of the file, for messages.

        Raises:
            CheckpointError: a broken base, or options that do not suit it.
        """
        task, model = task_type or tasks.get(merge["task_type"]), base
        if not isinstance(model, nn.Module):
            model = put_into(cls._loaded(task, Path(model)), getattr(torch, merge["dtype"]))
        try:
            merger = cls(
                model,
                merge["method"],
                task,
                seed=merge["seed"],
                device=device,
                vocabulary=merge.get("vocabulary", "same"),
                **merge["options"],
            )
        except ValueError as error:  # options that do not suit this model
            raise CheckpointError(f"{path}: {error}") from error
        if not isinstance(base, nn.Module):
            merger.base_folder, merger.base_name = Path(base), model_name(base)
        merger.merged = [MergedTask.of(noted) for noted in merge["tasks"]]
        merger.removed = [RemovedTask.of(noted) for noted in merge.get("removed", [])]
        merger.matrix = merge["matrix"]
        merger.unknown = merge.get("unknown", [[None] * len(row) for row in merger.matrix])
        merger.answers = {name: Answers.read(noted) for name, noted in merge.get("answers", {}).items()}
        return merger

    def _restore(self, saved: SavedTasks, state: Tensors, folder: Path) -> None:
        """Take on what `_kept` gave of each task, and the state of its method.

        Experts that are in files are read one by one, as the layers take copies of them.

        Raises:
            CheckpointError: tensors that belong to something else.
        """
        place, one_by_one = next(self.model.parameters()).device, isinstance(self.method, GatedMethod)
        try:
            own = [
                task.take(OnDevice(tensors, place), self.task, self.base)
                for task, tensors in zip(self.merged, saved, strict=True)
            ]
            kept = own if one_by_one else [dict(tensors) for tensors in own]
            self.method.restore(kept, {name: tensor.to(place) for name, tensor in state.items()})
            for number, tensors in enumerate(own):
                if left := sorted(tensors.keys() - self.method.task_tensors(number).keys()):
                    raise ValueError(f"there is no place for {left[0]!r}")
            if self.merged:
                self._put_head(-1)
        except CheckpointError:  # a file that cannot be read
            raise
        # what names, numbers and shapes of tensors that belong to something else lead to
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"the tensors do not fit the method {self.method.name!r} with these options"
            raise CheckpointError(f"{folder}: {reason}: {error}") from error


def model_name(model: nn.Module | str | Path) -> ModelName:
    """What a model is called; a module may say so in its configuration."""
    place: Any = (
        getattr(getattr(model, "config", None), "name_or_path", "") if isinstance(model, nn.Module) else model
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
