"""How many bytes of tensors are alive at once while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {
            part.untyped_storage()._cdata
            for part in tree_iter((args, kwargs))
            if isinstance(part, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if not isinstance(part, torch.Tensor) or part.is_meta:
                continue
            storage = part.untyped_storage()
            key = storage._cdata
            if key not in self.sizes and key not in known:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of new tensors that are alive at once during `run`."""
    with _Live() as live:
        run()
    return live.peak
