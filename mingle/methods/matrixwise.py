"""The common part of methods that merge matrix by matrix, and treat everything else alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mingle.kernels.dtypes import wide
from mingle.methods.base import Kept, Tensors, kept_size
from mingle.methods.tensorwise import Cost, Numbers, TensorMethod, TensorStep, moved
from mingle.nn.matrices import matrices
from mingle.tasks import TaskType

#: how far above its average the largest singular value of rounding errors may be
_MARGIN = 1.5


@dataclass(frozen=True)
class MatrixOptions:
    """Settings of all methods that go matrix by matrix.

    Attributes:
        scaling: α, the merged task vector's weight.
    """

    scaling: float = 1.0


class Change(NamedTuple):
    """What fine-tuning did to one matrix.

    Attributes:
        name: of the matrix.
        delta: Δ_t [d_out, d_in].
        rounding: singular values of Δ_t under this one may be rounding errors of the weights.
    """

    name: str
    delta: Tensor
    rounding: float


class MatrixMethod(TensorMethod):
    """θ = θ₀ + α M, with M a function of the task vectors in every matrix, and their mean elsewhere.

    The matrices are the weights of linear layers, and of packed experts one by one; biases, norms and
    embeddings are elsewhere.  Subclasses give `merge`, and `parts`: the names of what they keep of a matrix.
    """

    Options: ClassVar[type] = MatrixOptions
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        #: how each weight of a linear layer, or of packed experts, holds its matrices
        self.layouts = {name: layout for name, layout in matrices(self.tower).items() if name in self.base}

    @abstractmethod
    def merge(self, change: Change, seen: int, kept: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """The merged matrix [d_out, d_in], and what to keep of it, in the order of `parts`.

        Args:
            change: one more task's.
            seen: how many tasks were merged before.
            kept: what was kept after them; empty before the first.
        """

    @staticmethod
    @abstractmethod
    def kept_numbers(m: int, n: int) -> int:
        """How many numbers are kept of a matrix [m, n], at most."""

    @abstractmethod
    def work_numbers(self, m: int, n: int) -> int:
        """How many fp32 numbers `merge` has in memory for a matrix [m, n], beside Δ and what is kept."""

    def kept_bytes(self) -> Kept:
        size = kept_size(self.tower.state_dict().values())
        return Kept(0, size + sum(self.cost_of(name).kept for name in self.layouts))

    def elementwise(self, name: str) -> bool:
        return name not in self.layouts

    def cost_of(self, name: str) -> Cost:
        base = self.base[name]
        if (layout := self.layouts.get(name)) is None:
            return super().cost_of(name)
        matrices = layout.split(name, base).values()
        kept = sum(self.kept_numbers(*matrix.shape) for matrix in matrices)
        one = max(self.work_numbers(*matrix.shape) for matrix in matrices)
        # all of Δ, what is merged and the result, beside the matrix that is worked on
        size = wide(base).itemsize
        return Cost(size * (3 * base.numel() + one + 2 * kept), size * kept)

    def work_of(self, name: str) -> float:
        base, layout = self.base[name], self.layouts.get(name)
        if layout is None:
            return super().work_of(name)
        shapes = [matrix.shape for matrix in layout.split(name, base).values()]
        return float(sum(m * n * min(m, n) for m, n in shapes))

    def kept_of(self, name: str) -> tuple[str, ...]:
        layout = self.layouts.get(name)
        parts = [] if layout is None else layout.split(name, self.base[name])
        return tuple(f"{kind}/{part}" for part in parts for kind in self.parts)

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        scaling, seen, delta = self.options.scaling, step.seen, step.delta()
        layout = self.layouts.get(step.name)
        if layout is None:
            mean = step.vector()
            return moved(step.base, mean + (scaling * delta - mean) / (seen + 1)), {}
        merged: Tensors = {}
        state: Tensors = {}
        weights = layout.split(step.name, step.base)
        for name, part in layout.split(step.name, delta).items():
            keys = [f"{kind}/{name}" for kind in self.parts]
            change = Change(name, part, rounding(weights[name], step.tuned.dtype))
            merged[name], kept = self.merge(change, seen, [step.kept[key] for key in keys if seen])
            # as they will be read from a file, so that a merge that goes on there has the same bits
            state |= {key: tensor.contiguous() for key, tensor in zip(keys, kept, strict=True)}
        return moved(step.base, scaling * layout.joined(step.name, merged)), state


def rounding(weight: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value that a task vector [m, n] may owe to rounding.

    Errors of at most half a unit in the last place, independent of each other, make a matrix of norm
    ε ‖W‖ / √12, whose singular values reach that times 1/√m + 1/√n on average, and in small matrices a tenth
    more; the fine-tuned weight and the base's have one each.

    Args:
        weight: the base's, W.
        dtype: which the fine-tuned weight is kept in.
    """
    eps = max(torch.finfo(kind).eps for kind in (weight.dtype, dtype))
    m, n = weight.shape
    return _MARGIN * eps * 6**-0.5 * float(weight.double().norm()) * (m**-0.5 + n**-0.5)
