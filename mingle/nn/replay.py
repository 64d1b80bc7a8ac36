"""Several passes of a model over the same samples, in which one part of it computes only in the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Replay:
    """What a part of a model gave in a first pass, call by call."""

    def __init__(self) -> None:
        self._outputs: list[Any] = []
        self._calls = 0

    def again(self) -> None:
        """Begin another pass: the part's calls give, one after another, what they gave in the first."""
        self._calls = 0

    def __call__(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of the next call, computed where there is none yet."""
        if self._calls == len(self._outputs):
            self._outputs.append(compute(*args, **kwargs))
        self._calls += 1
        return self._outputs[self._calls - 1]


@contextmanager
def replayed(model: nn.Module, name: str | None) -> Iterator[Replay]:
    """Let a part of the model, with its hooks, compute once for several passes over the same samples.

    The part stays what it is in every other respect, also to code that does not call it but looks inside.

    Args:
        model: the model.
        name: the part's dotted name; empty for the whole model, None for no part at all.
    """
    replay = Replay()
    if name is None:
        yield replay
        return
    part: Any = model.get_submodule(name)
    plain = type(part)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replay(plain.__call__, self, *args, **kwargs)

    # Calls of a module go by its class; transformers knows classes by module and name.
    own = {"__call__": call, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    part.__class__ = type(plain.__name__, (plain,), own)
    try:
        yield replay
    finally:
        part.__class__ = plain
