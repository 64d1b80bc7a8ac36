"""Several passes of a model over the same samples, in which one part of it computes only in the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Replay:
    """What `replayed` yields.

    Attributes:
        model: what to call in the place of the model.
    """

    def __init__(self, model: nn.Module, part: _Recorded | None) -> None:
        self.model, self._part = model, part

    def again(self) -> None:
        """Begin another pass: the part's calls give, one after another, what they gave in the first."""
        if self._part is not None:
            self._part.calls = 0


@contextmanager
def replayed(model: nn.Module, name: str | None) -> Iterator[Replay]:
    """Let a part of the model compute once for several passes over the same samples.

    Args:
        model: is as it was when the context ends.
        name: the part's dotted name; empty for the whole model, None for no part at all.
    """
    if name is None:
        yield Replay(model, None)
        return
    module = model.get_submodule(name)
    part = _Recorded(module)
    if not name:
        yield Replay(part, part)
        return
    model.set_submodule(name, part)
    try:
        yield Replay(model, part)
    finally:
        model.set_submodule(name, module)


class _Recorded(nn.Module):
    """Stands in a module's place, and has its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.outputs: list[Any] = []
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls == len(self.outputs):
            self.outputs.append(self.module(*args, **kwargs))
        self.calls += 1
        return self.outputs[self.calls - 1]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)
