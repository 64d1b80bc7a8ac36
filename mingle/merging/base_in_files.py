"""A merge whose base stays in the files of its folder, and is read tensor by tensor."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import nn

from mingle import ranks
from mingle.io.state_dicts import state_hash
from mingle.merging.state import MergeState
from mingle.tasks import TaskType
from mingle.tasks.loading import BaseTensors


class BaseInFiles(MergeState):
    """A `MergeState` of which `base` is a skeleton, and `values` are the tensors in files."""

    @cached_property
    def values(self) -> BaseTensors:
        """The whole base's tensors, read when they are asked for."""
        raise NotImplementedError

    @cached_property
    def base_hash(self) -> str:
        """See `MergeState.base_hash`; one process reads all of the base for it, by tensors."""
        return _hash(self.values)

    @classmethod
    def hash_of(cls, task: TaskType, folder: Path) -> str:
        return _hash(BaseTensors(folder, cls._loaded(task, folder)))

    def _model_of(self, base: nn.Module | str | Path) -> nn.Module:
        return base if isinstance(base, nn.Module) else self._loaded(self.task, Path(base))


def _hash(values: BaseTensors) -> str:
    with ranks.together("reading the base"):
        return ranks.gather(state_hash(values) if ranks.rank() == 0 else "")[0]
