"""What layers are given, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def observed(layers: Mapping[str, Layer], observe: Callable[[str, Layer, Tensor], None]) -> Iterator[None]:
    """While the block runs, `observe` is told of every call of a layer before it: name, layer and input."""

    def told(name: str, layer: Layer, args: tuple[Tensor, ...]) -> None:
        observe(name, layer, args[0])

    handles = [layer.register_forward_pre_hook(partial(told, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
