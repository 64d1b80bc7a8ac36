"""A forward pass that ends where a given module would begin, for callers who need only what comes before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

#: called with the module that was reached, and with its positional and keyword arguments
OnReached = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], object]


class _Reached(Exception):
    """One of the modules of a call of `run_until` was reached."""


def run_until(
    modules: Iterable[nn.Module], run: Callable[[], object], on_reached: OnReached | None = None
) -> bool:
    """Call `run` up to where the first of `modules` is called.

    Args:
        modules: where to stop; their own hooks are not run.
        run: a forward pass of a model that holds them.
        on_reached: told of the module before the pass ends.

    Returns:
        Whether one of the modules was called; where none was, `run` has run to its end.
    """

    call = object()  # `run` may hold another call of this function, which must not take the end of this one

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if on_reached is not None:
            on_reached(module, args, kwargs)
        raise _Reached(call)

    handles = [module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True) for module in modules]
    try:
        run()
    except _Reached as error:
        if error.args != (call,):
            raise
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False
