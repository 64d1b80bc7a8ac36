"""A merge whose base stays in the files of its folder, and is read tensor by tensor."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle import ranks
from mingle.io.state_dicts import state_hash
from mingle.merging.state import MergeState
from mingle.tasks import TaskType
from mingle.tasks.loading import BaseTensors, computed
from mingle.tasks.precision import Precision, dtype_of


def not_as_stored(base: nn.Module) -> list[str]:
    """The tensors that a model does not have as its files have them.

    They are buffers, whose dtype depends on the architecture, and what is computed and in no file.
    """
    parameters, made = dict(base.named_parameters(remove_duplicate=False)), computed(base)
    return [name for name in base.state_dict() if name not in parameters or name in made]


class BaseInFiles(MergeState):
    """A `MergeState` of which `base` is a skeleton, and `values` are the tensors in files."""

    @cached_property
    def values(self) -> BaseTensors:
        """The whole base's tensors, read when they are asked for."""
        base: Any = self.base
        return BaseTensors(base.read_from, base, next(self.base.parameters()).dtype)

    @cached_property
    def base_hash(self) -> str:
        """See `MergeState.base_hash`; one process reads all of the base for it, by tensors."""
        return _hash(self.values)

    @classmethod
    def hash_of(cls, task: TaskType, folder: Path, dtype: Precision) -> str:
        return _hash(BaseTensors(folder, cls._loaded(task, folder), dtype_of(dtype)))

    def _model_of(self, base: nn.Module | str | Path) -> nn.Module:
        return base if isinstance(base, nn.Module) else self._loaded(self.task, Path(base))

    @staticmethod
    def _loaded(task: TaskType, folder: Path) -> nn.Module:
        model: Any = task.skeleton(folder).to(torch.float32).eval()
        model.read_from = folder
        return model


def _hash(values: BaseTensors) -> str:
    with ranks.together("reading the base"):
        return ranks.gather(state_hash(values) if ranks.rank() == 0 else "")[0]
