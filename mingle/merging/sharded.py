"""A merger for bases that do not fit one device: every process has a share of the blocks' weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.io.lazy_tensors import LazyTensors, Rows, described, in_rows, rows_of
from mingle.merging.base_in_files import BaseInFiles, not_as_stored
from mingle.merging.exports import Format
from mingle.merging.finetuned import FineTuned, Model
from mingle.merging.merger import Merger
from mingle.methods import MergeMethod, StepReport
from mingle.methods.base import Tensors
from mingle.methods.gated import GatedMethod
from mingle.nn.linear import MingleLinear
from mingle.nn.matrices import oriented
from mingle.nn.sharded import ShardedBlocks
from mingle.tasks import TaskData, TaskType
from mingle.tasks.heads import put_head
from mingle.tasks.skeletons import completed


def hindrance(method: type[MergeMethod], options: Any, task: TaskType, base: nn.Module) -> str:
    """Why a merge cannot go on with blocks that are shared out, in words; empty where it can.

    Args:
        method: its class.
        options: an instance of its `Options`.
        task: the base's task type.
        base: the base or its skeleton.
    """
    if not (issubclass(method, GatedMethod) and method.shares_blocks):
        return f"method {method.name!r} needs whole models; mingle and mingle-light do not"
    if getattr(options, "precision", "fp32") != "fp32":
        return f"precision {options.precision!r} would keep a whole copy of the weights"
    if not task.loads_as_stored:
        return f"the task type {task.name!r} has a way of its own to load models"
    if tensors := not_as_stored(base):
        return f"the model has buffers in its files, or tensors that are in none, such as {min(tensors)}"
    return ""


class ShardedMerger(BaseInFiles, Merger):
    """A `Merger` of which each process of a group has a share of the blocks' weights, base and experts.

    Gates, and all outside of the repeated blocks, every process has; see `mingle.nn.sharded`.  The base and
    the fine-tuned models are read from their folders, tensor by tensor.  A process alone has all weights.

        with mingle.ranks.joined():
            merger = ShardedMerger("base", "mingle")
            merger.add("svhn", "base_svhn", seeds)
            merger.save_pretrained("merged")

    After an error that comes while a task is merged, a merger of several processes is of no more use.

    Args:
        base_model: the folder of the base model.
        method, task_type, more: see `mingle.Merger`.
        device: where the shares live; None is the CPU.

    Raises:
        ValueError: also a method or a base that this cannot be done with, see `hindrance`.
    """

    def __init__(
        self,
        base_model: nn.Module | str | Path,
        method: str = "mingle",
        task_type: str | TaskType | None = None,
        *,
        device: str | torch.device | None = None,
        **more: Any,
    ) -> None:
        if isinstance(base_model, nn.Module) and not hasattr(base_model, "read_from"):
            raise ValueError("a base whose weights are shared out is read from its folder; give that")
        self._device = torch.device(device or "cpu")
        self._shared_out: ShardedBlocks | None = None
        #: the fine-tuned model, whose blocks are shared out like those of the merged one
        self._taught: tuple[nn.Module, ShardedBlocks] | None = None
        super().__init__(base_model, method, task_type, **more)

    def add(
        self,
        name: str,
        finetuned_model: Model,
        seed_data: TaskData | Mapping[str, Any] | None = None,
        on_step: Any = None,
    ) -> StepReport:
        """See `mingle.Merger.add`."""
        try:
            report = super().add(name, finetuned_model, seed_data, on_step)
            if self._taught is not None:
                self._taught[1].close()
        finally:
            self._taught = None
        return report

    def export(
        self,
        folder: str | Path,
        task: str | None = None,
        format: Format = "transformers",
        seed_data: TaskData | Mapping[str, Any] | None = None,
    ) -> None:
        """Raise `ValueError`: no process has the model."""
        raise ValueError(
            "no process has the whole model: save it, and export the folder with `mingle export`"
        )

    @staticmethod
    def _loaded(task: TaskType, folder: Path) -> nn.Module:
        return completed(BaseInFiles._loaded(task, folder), folder)

    def _begin(self, method: type[MergeMethod]) -> None:
        if reason := hindrance(method, self.options, self.task, self.base):
            raise ValueError(f"the weights cannot be shared out: {reason}")
        if self._shared_out is not None:
            self._shared_out.close()
        self.model = copy.deepcopy(self.base).eval()
        inside = self.task.tower(self.base)
        tower = _Inside(self.values, inside, list(self._base_tower))
        made: Any = method(self.model, self.task, tower, self.options)
        self._shared_out = self._filled(self.model, self.values)
        made.share_out(self._shared_out, self._device)
        self.method = made

    def _filled(self, model: nn.Module, values: Mapping[str, Tensor]) -> ShardedBlocks:
        """Give a model on the meta device its tensors, sharing out one block after another."""
        inside = self.task.tower(self.base)
        structure = self.task.structure(self.base)
        names = [
            f"{inside}.{block}".removeprefix(".") for stack in structure.stacks for block in stack.blocks
        ]
        blocks = ShardedBlocks(model, names)
        known: dict[int, nn.Parameter] = {}
        for name in names:
            _fill(model, name, values, self._device, known)
            blocks.share(name)
        _fill(model, "", values, self._device, known)
        model.to(self._device)  # buffers
        return blocks

    def tuned_tensors(self, model: FineTuned) -> Mapping[str, Tensor]:
        tuned = _Tuned(model, _Inside(self.values, self.task.tower(self.base), list(model.base)))
        for name in list(tuned)[ranks.rank() :: ranks.size()]:  # which raises for what is not finite
            tuned[name]
        return tuned

    def restorable(self) -> Callable[[], tuple[list[Tensors], Tensors]] | None:
        return super().restorable() if ranks.size() == 1 else None

    def teacher(self, tuned: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> nn.Module:
        if self._taught is not None:
            return self._taught[0]
        inside = self.task.tower(self.base)
        teacher = copy.deepcopy(self.base).eval()
        blocks = self._filled(teacher, _Replaced(self.values, f"{inside}." if inside else "", tuned))
        put_head(teacher, head)
        if ranks.size() > 1:  # a process alone reads it again rather than keep it while gates adapt
            self._taught = teacher, blocks
        return teacher


class _Inside(LazyTensors):
    """Those of a model's tensors that are inside of one of its parts, by their names there."""

    def __init__(self, values: LazyTensors, part: str, names: Collection[str]) -> None:
        super().__init__(dict.fromkeys(names))
        self._values, self._prefix = values, f"{part}." if part else ""

    def described(self, name: str) -> Tensor:
        return self._values.described(self._prefix + name)

    def rows(self, name: str, rows: Rows) -> Tensor:
        return self._values.rows(self._prefix + name, rows)

    def in_rows(self, name: str) -> bool:
        return self._values.in_rows(self._prefix + name)


class _Tuned(LazyTensors):
    """The tensors of a fine-tuned tower, see `FineTuned.tensors`, each made when it is asked for."""

    def __init__(self, model: FineTuned, base: LazyTensors) -> None:
        super().__init__(base)
        self._model, self._base = model, base

    def described(self, name: str) -> Tensor:
        return self._base.described(name)

    def rows(self, name: str, rows: Rows) -> Tensor:
        own = name in self._model.own  # then of the base only dtype and device count
        base = torch.empty(0, dtype=self.described(name).dtype) if own else self._base.rows(name, rows)
        return self._model.tensor(name, base, rows)

    def in_rows(self, name: str) -> bool:
        return self._model.in_rows(name)


class _Replaced(LazyTensors):
    """A whole model's tensors, of which those with a prefix are others."""

    def __init__(self, values: LazyTensors, prefix: str, tower: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self._values, self._prefix, self._tower = values, prefix, tower

    def _place(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        own = name.removeprefix(self._prefix)
        inside = name.startswith(self._prefix) and own in self._tower
        return (self._tower, own) if inside else (self._values, name)

    def described(self, name: str) -> Tensor:
        return described(*self._place(name))

    def rows(self, name: str, rows: Rows) -> Tensor:
        return rows_of(*self._place(name), rows)

    def in_rows(self, name: str) -> bool:
        return in_rows(*self._place(name))


def _fill(
    model: nn.Module,
    part: str,
    values: Mapping[str, Tensor],
    device: torch.device,
    known: dict[int, nn.Parameter],
) -> None:
    """Put values in the places of those parameters of a part of a model that are on the meta device.

    Args:
        model: the model.
        part: the part's dotted name; empty for all of it.
        values: by names in the state of the model.
        device: where they go.
        known: what has become of parameters; those that are tied together stay so.
    """
    for path, module in model.get_submodule(part).named_modules(prefix=part):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            name = f"{path}.{key}".removeprefix(".")
            if id(parameter) not in known:
                if name in values:
                    value = values[name]
                    if isinstance(module, MingleLinear) and key == "weight":
                        value = oriented(value, module)
                else:  # experts and gates, of which there are none yet
                    value = torch.empty(parameter.shape)
                    assert not value.numel(), name
                value = value.to(device, parameter.dtype)
                known[id(parameter)] = nn.Parameter(value, requires_grad=False)
            setattr(module, key, known[id(parameter)])
