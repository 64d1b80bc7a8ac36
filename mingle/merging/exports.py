"""A merge for other programs: one plain model, a plain model for one task, or adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mingle.io import adapters_folder, export, merger_folder
from mingle.io.hub import ModelName
from mingle.io.lazy_tensors import LazyTensors
from mingle.io.model_card import adapters_card, folded_card, model_card
from mingle.merging import adapters
from mingle.methods import MergeMethod
from mingle.methods.base import Tensors
from mingle.options import nearest
from mingle.tasks import TaskData
from mingle.tasks.configs import CONFIG
from mingle.tasks.heads import class_count
from mingle.tasks.names import InFiles, in_files

Format = Literal["transformers", "peft"]
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class Merged:
    """What a merger has to write.

    Attributes:
        base: the whole base model.
        base_folder: where it came from, if that is a folder.
        base_name: what it is called.
        method: with all that is merged.
        described: what a saved merge says of itself, in the form of `mingle.io.manifest.MERGE`.
        head, labels: of the task whose model is asked for, if it has a head of its own: its tensors by their
            names in the whole model, and the names of its classes.
    """

    base: nn.Module
    base_folder: Path | None
    base_name: ModelName
    method: MergeMethod
    described: dict[str, Any]
    head: Tensors = field(default_factory=dict)
    labels: Sequence[str] = ()

    def names(self) -> list[str]:
        """The merged tasks in order of arrival."""
        return [task["name"] for task in self.described["tasks"]]

    def tower(self) -> str:
        """The name in the base of the part that is merged; empty where that is all of it."""
        return self.method.task.tower(self.base)


def check(task: str | None, format: str, *, seeds: bool) -> None:
    """Raise `ValueError` for a request that makes no sense with any method.

    Args:
        task, format: see `mingle.Merger.export`.
        seeds: whether samples of the task were given.
    """
    if format not in FORMATS:
        expected = ", ".join(FORMATS)
        raise ValueError(f"format={format!r}{nearest(format, FORMATS)}; expected one of {expected}")
    if format == "peft" and task is not None:
        raise ValueError(f"task {task!r}: adapters are exported for all tasks together; leave the task out")
    if seeds and task is None:
        raise ValueError("seed_data is for the model of one task, and no task was named")


def check_task(method: MergeMethod, task: str | None, names: Sequence[str], *, owned: bool) -> None:
    """Raise `ValueError` where no task was named and each has a model, or a head, of its own.

    Args:
        method: that has merged.
        task: the one that was named, if any.
        names: of all merged tasks.
        owned: whether tasks have heads.
    """
    if task is None and (method.per_task or owned):
        reason = "each task has a head of its own"
        if method.per_task:
            reason = f"method {method.name!r} keeps one model per task"
        raise ValueError(f"{reason}; name one of {', '.join(names)}")


def write_plain(folder: Path, merged: Merged, state: LazyTensors | None = None) -> None:
    """Write the model that serves all tasks, or, of the reference row ``individual``, the selected one.

    Args:
        folder: a new or an empty folder.
        merged: the merge.
        state: the whole model, where its tensors are made when they are asked for.
    """
    card = model_card(folder.name, merged.described, merged.base_name)
    _write(folder, merged, _whole(merged, merged.method.plain_tower()) if state is None else state, card)


def write_folded(folder: Path, merged: Merged, task: str, samples: TaskData | None) -> None:
    """Write a plain model for one task, with the gates' means over samples of it, where there are any."""
    folded = merged.method.folded(merged.names().index(task), samples)
    count = None if samples is None else len(samples)
    write_constant(folder, merged, task, _whole(merged, folded.tower), folded.by_task, count)


def write_constant(
    folder: Path,
    merged: Merged,
    task: str,
    state: Mapping[str, Tensor],
    by_task: Tensor,
    count: int | None = None,
) -> None:
    """Write a plain model for one task that has constant gates in its weights.

    Args:
        folder: a new or an empty folder.
        merged: the merge.
        task: the task's name.
        state: the whole model.
        by_task: the gates, see `mingle.methods.base.Folded`.
        count: how many samples they are means over; None for none.
    """
    experts = [entry["name"] for entry in merged.described["tasks"] if entry["skipped"] is None]
    gates = {
        name: (row.mean().item(), row.min().item(), row.max().item())
        for name, row in zip(experts, by_task, strict=True)
    }
    card = folded_card(folder.name, merged.described, merged.base_name, task, gates, count)
    _write(folder, merged, state, card)


def write_adapters(folder: Path, merged: Merged, kept: Sequence[Tensors], heads: Sequence[Tensors]) -> None:
    """Write a folder of adapters, see `mingle.io.adapters_folder`.

    Args:
        folder: a new or an empty folder.
        merged: the merge.
        kept: all that is kept of each task alone.
        heads: the tensors of each task's head, by their names in the whole model.
    """
    method, described, tower = merged.method, merged.described, merged.tower()
    experts = [method.adapter(i) for i in range(len(described["tasks"]))]
    if not any(experts):
        raise ValueError("no expert was merged yet, so there are no adapters to export")
    names = adapters_folder.folder_names(merged.names())
    folders = [name if expert else None for name, expert in zip(names, experts, strict=True)]
    found = {name: i for i, name in enumerate(folders) if name is not None}
    base, called = merged.base, merged.base_name
    card = adapters_card(
        folder.name,
        described,
        called,
        adapters.class_in_transformers(base),
        folders,
        {name: adapters.ranks(experts[i]) for name, i in found.items()},
        tower,
        classes=class_count(heads[next(iter(found.values()))]),
        chooses=method.chooses(),
    )
    description = described | {
        "tasks": [t | {"adapter": name} for t, name in zip(described["tasks"], folders, strict=True)],
        "base": {"sha256": merger_folder.state_hash(base), **called._asdict()},
    }
    adapters_folder.write(
        folder,
        description,
        {name: adapters.files(base, tower, called, experts[i], heads[i]) for name, i in found.items()},
        [adapters.beside(tensors, expert) for tensors, expert in zip(kept, experts, strict=True)],
        method.state_tensors(),
        card,
    )


def _whole(merged: Merged, tower: Tensors) -> Tensors:
    return export.whole_model(merged.base, merged.tower(), tower) | merged.head


def _write(folder: Path, merged: Merged, state: Mapping[str, Tensor], card: str) -> None:
    dtype = next(merged.base.parameters()).dtype
    config = export.hub_config(merged.base, merged.base_folder, dtype)
    if merged.head:
        config = export.with_head(config, type(merged.base).__name__, merged.labels)
    files = merged.method.task.files(merged.base) if merged.base_folder is None else {}
    held: Mapping[str, Tensor] = (
        InFiles(merged.base, state) if isinstance(state, LazyTensors) else in_files(merged.base, state)
    )
    export.write_model(folder, held, files | {CONFIG: config}, merged.base_folder, card)
