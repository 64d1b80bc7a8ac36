"""WUDI-Merging: the task vector that disturbs no task's inputs (Cheng et al., arXiv 2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mingle import linalg
from mingle.linalg.arithmetic import ieee, product
from mingle.methods.matrixwise import Change, MatrixMethod, MatrixOptions
from mingle.options import require_not_negative


@dataclass(frozen=True)
class WudiOptions(MatrixOptions):
    """Settings of WUDI; the defaults are the published ones.

    Attributes:
        solver: ``adam``, as published, or ``exact``, the minimum that is closest to the sum of the task
            vectors, where Adam starts.
        lr, steps: of Adam.
    """

    solver: Literal["adam", "exact"] = "adam"
    lr: float = 1e-5
    steps: int = 300

    def __post_init__(self) -> None:
        require_not_negative(self, "lr", "steps")


@ieee
def descended(start: Tensor, square: Tensor, target: Tensor, lr: float, steps: int) -> Tensor:
    """M [m, n] after `steps` of Adam from `start` on the loss of WUDI.

        L = Σ_i ‖(M − Δ_i) Δ_iᵀ‖² / ‖Δ_i‖²,    ∂L/∂M = 2 (M H − N)

    Args:
        start: [m, n].
        square: H = Σ_i Δ_iᵀ Δ_i / ‖Δ_i‖² [n, n].
        target: N = Σ_i Δ_i Δ_iᵀ Δ_i / ‖Δ_i‖² [m, n].
    """
    M = start.clone(memory_format=torch.contiguous_format)  # fused Adam reads M and its gradient in one order
    optimizer = torch.optim.Adam([M], lr=lr, fused=True)
    for _ in range(steps):
        M.grad = 2 * (product(M, square) - target)
        optimizer.step()
    M.grad = None
    return M


@ieee
def solved(start: Tensor, square: Tensor, target: Tensor) -> Tensor:
    """The minimum of the loss that is closest to `start`, S + (N − S H) H⁺; see `descended`."""
    S, H, N = start.double(), square.double(), target.double()
    inverse = torch.linalg.pinv(H, rtol=linalg.NULL_SPACE_TOLERANCE, hermitian=True)
    return (S + (N - S @ H) @ inverse).to(start)


class Wudi(MatrixMethod):
    """M minimises what it adds to every task on the inputs that the task's own vector spans.

    The loss is quadratic, and all it needs of the tasks are three sums.  So after every arrival the result
    is that of all models at once, and what is kept does not grow with their number.
    """

    name = "wudi"
    Options = WudiOptions
    parts = ("sum", "square", "target")

    @staticmethod
    def kept_numbers(m: int, n: int) -> int:
        return 2 * m * n + n * n

    def work_numbers(self, m: int, n: int) -> int:
        return 6 * m * n + 12 * n * n if self.options.solver == "exact" else 4 * m * n

    @ieee
    def merge(self, change: Change, seen: int, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        delta, size = change.delta, change.delta.square().sum()
        rows = delta / size if size > 0 else delta  # a task that changed nothing has no part in any sum
        square = product(rows.mT, delta)
        new = delta, square, product(delta, square)
        if not seen:
            return delta, new
        total, square, target = (old + own for old, own in zip(kept, new, strict=True))
        if self.options.solver == "exact":
            merged = solved(total, square, target)
        else:
            merged = descended(total, square, target, self.options.lr, self.options.steps)
        return merged, (total, square, target)
