"""The one place that keeps numbers which are not finite out of merged models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch

from mingle.io.state_dicts import non_finite
from mingle.methods import MergeMethod
from mingle.nn.sharded import own_part


class NonFiniteMerge(ArithmeticError):
    """A method's result has NaN or infinite values; the message names method, task and tensor."""


def refuse_non_finite(
    method: MergeMethod, task: str, task_tensors: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    """Raise `NonFiniteMerge` unless the merged model, and all that a save would write, is finite.

    Of tensors that are shared out, each process looks at its own part.

    Args:
        method: with its model.
        task: the name of the task that was merged last.
        task_tensors: what is kept of tasks alone.
    """
    kept = [*task_tensors, method.state_tensors(), method.model.state_dict()]
    for name, tensor in chain.from_iterable(tensors.items() for tensors in kept):
        refuse(method, task, name, own_part(tensor))


def refuse(
    method: MergeMethod, task: str, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise `NonFiniteMerge` unless a tensor of that name is finite, rounded to the dtype if one is given."""
    if found := non_finite(tensor, dtype):
        raise NonFiniteMerge(f"method {method.name!r}, task {task!r}: {name}: {found}; nothing was saved")
