"""What layers are given while a model runs, and other gates than their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from mingle.nn.linear import MingleLinear

Layer = TypeVar("Layer", bound=nn.Module)

_aside: ContextVar[bool] = ContextVar("whether layers run beside the model's own pass", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Inside the block layers run beside the model's own pass, as for a router's look at the base.

    Observers are not told of these calls, and `gates_made_of` leaves their gates alone.
    """
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


@contextmanager
def observed(layers: Mapping[str, Layer], observe: Callable[[str, Layer, Tensor], None]) -> Iterator[None]:
    """While the block runs, `observe` is told of every call of a layer before it: name, layer and input.

    It is told nothing of those `aside`.
    """

    def told(name: str, layer: Layer, args: tuple[Tensor, ...]) -> None:
        if not _aside.get():
            observe(name, layer, args[0])

    handles = [layer.register_forward_pre_hook(partial(told, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gates_made_of(layers: Mapping[str, MingleLinear], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, every layer's gates [..., T] are what `make` makes of its own, or of a router's."""
    given: dict[MingleLinear, Tensor | None] = {}

    def before(layer: MingleLinear, args: tuple[Tensor, ...]) -> None:
        if _aside.get():
            return
        given[layer] = layer.given_gates
        layer.given_gates = make(layer.gates(args[0]))

    def after(layer: MingleLinear, *_: Any) -> None:
        if layer in given:
            layer.given_gates = given.pop(layer)

    handles = [layer.register_forward_pre_hook(before) for layer in layers.values()]
    handles += [layer.register_forward_hook(after) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, gates in given.items():
            layer.given_gates = gates
