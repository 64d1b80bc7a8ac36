"""Gates that are kept on a key-value cache: whatever happens to its rows happens to theirs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache as remembered
from typing import Any

from torch import Tensor

#: the attribute of a cache that holds the gates, [n, T] for its n rows
_ATTRIBUTE = "mingle_gates"


def cache_in(values: Iterable[Any]) -> Any:
    """The first key-value cache among the arguments or results of a model, of whatever class; None without.

    `transformers` has changed the name of the argument, and has a class for every kind of attention.
    """
    for value in values:
        if hasattr(value, "reorder_cache") and hasattr(value, "get_seq_length"):
            return value
    return None


def length(cache: Any) -> int:
    """How many tokens a cache has seen; 0 where it keeps states alone, and does not count."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return 0


def keep(cache: Any, gates: Tensor) -> None:
    """Let gates [n, T] be those of the n sequences in a cache from now on."""
    if not isinstance(cache, _KeepsGates):
        own: Any = type(cache)
        cache.__class__ = _with_gates(own)
    setattr(cache, _ATTRIBUTE, gates)


def kept(cache: Any) -> Tensor | None:
    """The gates [n, T] of the sequences in a cache; None where none were decided on."""
    gates: Tensor | None = getattr(cache, _ATTRIBUTE, None)
    return gates


class _KeepsGates:
    """What a cache's class is mixed with, so that its gates follow its rows."""

    def _choose(self, rows: Any) -> None:
        gates = kept(self)
        if gates is not None:
            setattr(self, _ATTRIBUTE, gates[rows.to(gates.device) if isinstance(rows, Tensor) else rows])

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self._choose(beam_idx)
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self._choose(indices)
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        gates = kept(self)
        if gates is not None:
            setattr(self, _ATTRIBUTE, gates.repeat_interleave(repeats, 0))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        result = super().crop(*args, **kwargs)  # type: ignore[misc]
        if length(self) == 0:
            setattr(self, _ATTRIBUTE, None)
        return result

    def reset(self) -> Any:
        setattr(self, _ATTRIBUTE, None)
        return super().reset()  # type: ignore[misc]

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        (_, own), state = type(self).__bases__, dict(vars(self))
        return _revived, (own,), state


@remembered
def _with_gates(own: Any) -> Any:
    """The class `own`, with gates."""
    return type(own.__name__, (_KeepsGates, own), {"__doc__": own.__doc__, "__module__": own.__module__})


def _revived(own: Any) -> Any:
    """A cache with gates whose state is still to come, for copies."""
    made = _with_gates(own)
    return made.__new__(made)
