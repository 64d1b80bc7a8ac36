"""Copies of frozen factors in the layouts that CPU products are fastest in, for layers that ask for them.

oneDNN lays a weight out anew at every product, and adds the experts to the base by reading and writing all of
y once more.  `keep` spares both: from then on the grouped backend computes y = [x | z ⊙ H] [W₀ | B_cat]ᵀ + b,
base and experts in one accumulator as the fused kernels do, with A_cat and [W₀ | B_cat] in oneDNN's own
layout; where experts are folded it finds B_cat row by row.  The copies take as much memory as the factors.

A copy is made at its first use and found by the memory, shape and strides of its factors, whatever view of
them is asked about.  It lives as long as they do, and is never used once one of them was changed in place,
moved or replaced.  (A change in place through ``.data`` shows in no version counter: nobody can see it.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch

from mingle.kernels import gemm

_copies: dict[Hashable, _Copy] = {}


class _Copy:
    """One layout of some factors, which are watched, not kept alive."""

    def __init__(
        self, key: Hashable, factors: Sequence[torch.Tensor], make: Callable[[], torch.Tensor]
    ) -> None:
        # `copies` is bound early: the interpreter may be shutting down.
        def forget(_: object, copies: dict[Hashable, _Copy] = _copies) -> None:
            copies.pop(key, None)

        # A detached factor keeps its memory: nothing else can take the place of one that was replaced.
        self._watched = [
            (weakref.ref(factor, forget), factor.detach(), factor._version) for factor in factors
        ]
        self._make = make
        self._tensor: torch.Tensor | None = None

    def current(self) -> bool:
        """Whether all factors are where and what they were."""
        for reference, known, version in self._watched:
            factor = reference()
            if factor is None or factor._version != version or factor.data_ptr() != known.data_ptr():
                return False
        return True

    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            with torch.no_grad():
                self._tensor = self._make()
        return self._tensor


def keep(weight: torch.Tensor, A: torch.Tensor, up: torch.Tensor) -> None:
    """Keep copies of a layer's factors weight [O, K], A [T, r, K] and up = Bᵀ [T, r, O].

    To be called again after a change.  Without effect on devices other than CPUs, and for tensors of
    inference mode, whose changes leave no trace.
    """
    # One look says whether all is well, for layers call this at every forward pass.
    all_three = ("kept", id(weight), id(A), id(up))
    known = _copies.get(all_three)
    if known is not None and known.current():
        return
    W, B = weight.detach(), up.detach().flatten(0, 1).mT  # [O, K], [O, T·r]
    _watch("joined", (weight, up), (weight, up), lambda: gemm.pack(torch.cat([W, B], 1)))
    _watch("rows", (up,), (up,), B.contiguous)
    keep_shrink(A, (A,))
    if _watchable(weight, A, up):
        _copies[all_three] = _Copy(all_three, (weight, A, up), weight.detach)


def keep_shrink(A: torch.Tensor, factors: Sequence[torch.Tensor]) -> None:
    """The same for A [T, r, K] alone, a view of the memory of all `factors`."""
    down = A.detach().flatten(0, 1)
    _watch("shrink", (A,), factors, lambda: gemm.pack(down))


def drop_stale() -> None:
    """Free the copies of factors that have changed or moved since."""
    for key, copy in list(_copies.items()):
        if not copy.current():
            _copies.pop(key, None)


def find(layout: str, *factors: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor | None:
    """The copy of these factors in a layout, or None.

    Layouts are ``"shrink"`` of A and ``"joined"`` of W₀ and up, both packed, and ``"rows"`` of up.  A packed
    one is for products with x, and None where such a product would not be the fastest.
    """
    if not _copies or factors[0].device.type != "cpu":
        return None
    if x is not None and not gemm.packing_pays(x, factors[0].numel() // factors[0].shape[-1]):
        return None
    copy = _copies.get(_key(layout, factors))
    return copy.tensor() if copy is not None and copy.current() else None


def _watchable(*factors: torch.Tensor) -> bool:
    return all(
        factor.device.type == "cpu" and not factor.is_inference() and factor.numel() > 0 for factor in factors
    )


def _key(layout: str, views: Sequence[torch.Tensor]) -> Hashable:
    return layout, *((view.data_ptr(), view.dtype, view.shape, view.stride()) for view in views)


def _watch(
    layout: str,
    views: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    make: Callable[[], torch.Tensor],
) -> None:
    """Let `make` serve for `views` of `factors`, unless a copy of theirs is there already."""
    if not _watchable(*factors):
        return
    key = _key(layout, views)
    known = _copies.get(key)
    if known is None or not known.current():
        drop_stale()
        _copies[key] = _Copy(key, factors, make)
