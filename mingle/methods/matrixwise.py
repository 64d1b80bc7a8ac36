"""The common part of methods that merge matrix by matrix, and treat everything else alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mingle.kernels.dtypes import wide
from mingle.methods.base import Arrival, Kept, Tensors, WeightMethod, kept_size, shifted
from mingle.nn.matrices import joined, matrices, split
from mingle.tasks import TaskType


class MatrixMethod(WeightMethod):
    """θ = θ₀ + α M, with M a function of the task vectors in every matrix, and their mean elsewhere.

    The matrices are the weights of linear layers, and of packed experts one by one; biases, norms and
    embeddings are elsewhere.  Subclasses give `merge`, and their `Options` have ``scaling``, α.
    """

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        #: how each weight of a linear layer, or of packed experts, holds its matrices
        self.layouts = {name: layout for name, layout in matrices(self.tower).items() if name in self.base}

    @abstractmethod
    def merge(self, deltas: Tensors, roundings: Mapping[str, float], index: int) -> tuple[Tensors, Tensors]:
        """The merged matrices and the new running state, from `state` and one more task's.

        Args:
            deltas: Δ_t [d_out, d_in] by matrix.
            roundings: singular values of Δ_t under this one may be rounding errors of the weights.
            index: how many tasks were merged before.
        """

    @staticmethod
    @abstractmethod
    def kept_numbers(m: int, n: int) -> int:
        """How many numbers the running state has of a matrix [m, n], at most."""

    def kept_bytes(self) -> Kept:
        size = kept_size(self.tower.state_dict().values())
        for matrix in split(self.layouts, self.base).values():
            size += self.kept_numbers(*matrix.shape) * wide(matrix).itemsize
        return Kept(0, size)

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        vector, delta = self.vectors(arrival.tuned)
        scaling, seen = self.options.scaling, arrival.index
        weights = split(self.layouts, self.base)
        stored = split(self.layouts, arrival.tuned)
        roundings = {name: rounding(W, stored[name].dtype) for name, W in weights.items()}
        parts, state = self.merge(split(self.layouts, delta), roundings, seen)
        vector = {
            name: M + (scaling * delta[name] - M) / (seen + 1)
            for name, M in vector.items()
            if name not in self.layouts
        } | {name: scaling * M for name, M in joined(self.layouts, parts).items()}
        return shifted(self.base, vector), state


def rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value that a task vector [m, n] may owe to rounding.

    Errors of at most half a unit in the last place, independent of each other, make a matrix of norm
    ε ‖W‖ / √12, whose singular values reach that times 1/√m + 1/√n; the fine-tuned weight and the base's
    have one each.

    Args:
        weight: the base's, W.
        dtype: which the fine-tuned weight is kept in.
    """
    eps = max(torch.finfo(kind).eps for kind in (weight.dtype, dtype))
    m, n = weight.shape
    return eps * 6**-0.5 * float(weight.double().norm()) * (m**-0.5 + n**-0.5)
