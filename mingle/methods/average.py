"""Stochastic-weight averaging (Izmailov et al., 2018): a running mean of the models as they arrive."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mingle.methods.base import Tensors
from mingle.methods.tensorwise import Numbers, TensorMethod, TensorStep


def running_mean(mean: Tensor, new: Tensor, seen: int) -> Tensor:
    """The mean of `seen` + 1 tensors, from the mean of the first `seen` and the next one."""
    return mean + (new.to(mean) - mean) / (seen + 1)


class Average(TensorMethod):
    """θ_t = mean of the t fine-tuned models; the base takes no part."""

    name = "average"
    copies = 2.0

    def elementwise(self, name: str) -> bool:
        return True

    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        return running_mean(step.merged, step.tuned, step.seen), {}
