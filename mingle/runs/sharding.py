"""Whether the weights of a merge's models are shared out, see `mingle.merging.sharded`.

A process alone, which has all of them, then leaves the base and the fine-tuned models in their files.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from mingle import ranks
from mingle.merging.sharded import hindrance
from mingle.methods import MergeMethod
from mingle.options import OptionError
from mingle.runs import forecast

#: ``auto``: where a process has too little memory for whole models
Shard = Literal["auto", "always", "never"]


def refuse_impossible(choice: Shard, method: MergeMethod) -> None:
    """Raise `OptionError` where ``always`` is asked for, and a merge cannot do without whole models.

    Args:
        choice: what was asked for.
        method: fitted to the base or to its skeleton.
    """
    if choice == "always" and (reason := _hindrance(method)):
        raise OptionError(f"shard: always: {reason}")


def decided(choice: Shard, method: MergeMethod, memory: int) -> bool:
    """Whether weights are shared out; all processes call it, and decide alike.

    Args:
        choice, method: see `refuse_impossible`.
        memory: the bytes that a process with whole models takes.
    """
    refuse_impossible(choice, method)
    if choice == "never" or _hindrance(method):
        return False
    return choice == "always" or any(ranks.gather(memory > there()))


def there() -> int:
    """The bytes of memory that this process may take: those of its GPU, or its part of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return forecast.available() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size()))


def _hindrance(method: MergeMethod) -> str:
    return hindrance(type(method), method.options, method.task, method.model)
