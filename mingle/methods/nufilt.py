"""NUFILT: null-space filtering for data-free continual merging (arXiv 2509.21413)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mingle import linalg
from mingle.io.state_dicts import task_vector
from mingle.kernels.dtypes import wide
from mingle.linalg.arithmetic import buckets, ieee, product, stacked
from mingle.linalg.sketch import gaussian
from mingle.methods.base import Arrival, Tensors
from mingle.methods.tensorwise import Cost, Numbers, TensorMethod, TensorStep, moved
from mingle.nn.inject import find_weights
from mingle.nn.matrices import joined, packed_experts, split
from mingle.options import require_not_negative, require_positive
from mingle.tasks import TaskType

#: standard deviation of A before training; B starts at 0
INIT_STD = 0.02


@dataclass(frozen=True)
class NufiltOptions:
    """Settings of NUFILT; the defaults are the published ones.

    Attributes:
        r_p: how many right singular vectors of the merged update are filtered out of a new one.
        r_v: how many right singular vectors of the new update the loss protects.
        r_l: rank of the trained correction B A.
        lr, steps: the learning rate and the number of steps of Adam.
        layers: target layers, or parameters of packed experts, as exact suffixes; None takes the method's own
            set for the task type and all packed experts.

    Ranks larger than a layer's shorter side are reduced to it.
    """

    r_p: int = 128
    r_v: int = 8
    r_l: int = 64
    lr: float = 1e-3
    steps: int = 50
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_positive(self, "r_p", "r_v", "r_l")
        require_not_negative(self, "lr", "steps")


@ieee
def trained(
    delta: Tensor, merged: Tensor, old: Tensor, new: Tensor, A: Tensor, steps: int, lr: float
) -> tuple[Tensor, Tensor]:
    """A and B after `steps` of Adam on the loss of NUFILT, for a batch of layers.

        L = ‖ΔV_new − (M + Δ(P + BA))V_new‖² + ‖MV_old − (M + Δ(P + BA))V_old‖²,   P = I − V_old V_oldᵀ.

    Because PV_old = 0, this is ‖[R | 0] − ΔBC‖² with C = A [V_new | V_old] and
    R = ΔV_old (V_oldᵀV_new) − MV_new.  With G = ΔᵀΔ and S = ΔᵀR its gradients are

        ∂L/∂A = 2 (BᵀGB C − [BᵀS | 0]) [V_new | V_old]ᵀ,   ∂L/∂Bᵀ = 2 (CCᵀ BᵀG − C_new Sᵀ).

    G and S are computed once.  A step takes little more than 2 r_l d_in (d_in + 2 (r_p + r_v) + 2 r_l)
    operations, whatever d_out is; where d_in > 2 d_out, Bᵀ is multiplied by Δᵀ and Δ instead of G.

    Args:
        delta, merged: Δ and M [..., d_out, d_in].
        old, new: V_old [..., d_in, r_p] and V_new [..., d_in, r_v]; zero columns take no part.
        A: [..., r_l, d_in], where training starts; B starts at 0.
    """
    r = A.shape[-2]
    V = torch.cat([new, old], -1)
    rows = V.mT.contiguous()
    R = product(product(delta, old), product(old.mT, new)) - product(merged, new)
    S = product(delta.mT, R)
    square = product(delta.mT, delta) if delta.shape[-1] <= 2 * delta.shape[-2] else None
    weights = torch.cat([A, torch.zeros_like(A)], -2)  # [A; Bᵀ]
    weights.grad = torch.empty_like(weights)
    A, B = weights[..., :r, :], weights[..., r:, :].mT
    optimizer = torch.optim.Adam([weights], lr=lr, fused=True)
    for _ in range(steps):
        C = product(A, V)
        C_new = C[..., : new.shape[-1]]
        BG = product(B.mT, square) if square is not None else product(product(B.mT, delta.mT), delta)
        E = product(product(BG, B), C)
        E[..., : new.shape[-1]] -= product(B.mT, S)
        weights.grad[..., :r, :] = product(2 * E, rows)
        weights.grad[..., r:, :] = product(2 * product(C, C.mT), BG) - product(2 * C_new, S.mT)
        optimizer.step()
    return A, B


@ieee
def filtered(delta: Tensor, old: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Δ(P + BA), [..., d_out, d_in].

    Args:
        delta: Δ [..., d_out, d_in].
        old: V_old [..., d_in, r_p].
        A: [..., r_l, d_in].
        B: [..., d_in, r_l].
    """
    return delta + product(product(delta, B), A) - product(product(delta, old), old.mT)


def updates(
    deltas: Mapping[str, Tensor], merged: Mapping[str, Tensor], options: NufiltOptions, seed: int
) -> Tensors:
    """The update of every layer's weight, [d_out, d_in], for task vectors Δ and merged updates M.

    Where M or Δ is zero, the update is Δ itself: there is nothing to protect.  Where their rank is less than
    r_p or r_v, only the directions that exist are singular vectors; the null space of M holds nothing that
    needs protection.  The initial A depends only on `seed` and the layer's name.

    Args:
        deltas: Δ [d_out, d_in] by layer.
        merged: M [d_out, d_in] by layer.
        options: see `NufiltOptions`.
        seed: of the initial A.
    """
    results = dict(deltas)
    names = [name for name in deltas if merged[name].any() and deltas[name].any()]
    matrices, before = [deltas[name] for name in names], [merged[name] for name in names]
    old, new = right_vectors(before, options.r_p, names), right_vectors(matrices, options.r_v, names)
    for places in buckets(matrices):
        delta, M, V_old, V_new = (stacked([part[i] for i in places]) for part in (matrices, before, old, new))
        r, width = min(options.r_l, *delta.shape[-2:]), delta.shape[-1]
        start = INIT_STD * gaussian(seed, [names[i] for i in places], r, width, delta.device, delta.dtype)
        A, B = trained(
            delta, M, V_old, V_new, start.view(*delta.shape[:-2], r, width), options.steps, options.lr
        )
        parts = filtered(delta, V_old, A, B).view(len(places), *delta.shape[-2:])
        results |= {names[i]: part for i, part in zip(places, parts, strict=True)}
    return results


def right_vectors(matrices: list[Tensor], rank: int, names: list[str]) -> list[Tensor]:
    """The top right singular vectors [d_in, rank] of each matrix; where there are fewer, columns are zero."""
    _, S, Vh = linalg.svd_lowrank(matrices, rank, keys=names)
    return [
        (torch.where(s > 0, 1, 0).to(vh).unsqueeze(1) * vh).mT.contiguous()
        for s, vh in zip(S, Vh, strict=True)
    ]


class Nufilt(TensorMethod):
    """W ← W + Δ(P + BA) in attention and first MLP layers, and in every matrix of packed experts.

    All other parameters, biases included, stay those of the base.
    """

    name = "nufilt"
    Options = NufiltOptions
    updates_alike = True
    copies = 2.0

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        targets = options.layers or (*task.structure(model).sets["nufilt"], *packed_experts(self.tower))
        #: how each of the target weights holds its matrices
        self.layouts = find_weights(self.tower, targets)
        self.targets = list(self.layouts)

    def merges(self) -> Collection[str]:
        return self.targets

    def elementwise(self, name: str) -> bool:
        return name not in self.layouts

    def cost_of(self, name: str) -> Cost:
        if name not in self.layouts:
            return super().cost_of(name)
        base = self.base[name]
        # As counted for shapes of all kinds: Δ, M, copies of both and what decomposes them, matrices of the
        # shorter side, and vectors.
        numbers = 0.0
        for m, n in (matrix.shape for matrix in self.layouts[name].split(name, base).values()):
            numbers += 5.8 * m * n + 4.2 * min(m, n) ** 2 + 4 * (m + n) * (self.options.r_p + 64)
        return Cost(round(wide(base).itemsize * numbers))

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        if step.name not in self.layouts:
            return step.merged, {}
        layouts = {step.name: self.layouts[step.name]}
        deltas, merged = split(layouts, {step.name: step.delta()}), split(layouts, {step.name: step.vector()})
        change = joined(layouts, updates(deltas, merged, self.options, step.seed))
        return moved(step.merged, change[step.name]), {}

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        deltas = task_vector(self.base, arrival.tuned, self.targets)
        merged = task_vector(self.base, self.merged, self.targets)
        parts = updates(split(self.layouts, deltas), split(self.layouts, merged), self.options, arrival.seed)
        added = joined(self.layouts, parts)
        return self.merged | {name: moved(self.merged[name], change) for name, change in added.items()}, {}
