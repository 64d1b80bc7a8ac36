"""Stochastic-weight averaging (Izmailov et al., 2018): a running mean of the models as they arrive."""

from __future__ import annotations

from mingle.methods.base import Arrival, Tensors, WeightMethod


def running_mean(merged: Tensors, tuned: Tensors, seen: int) -> Tensors:
    """The mean of `seen` + 1 models, from the mean of the first `seen` and the next one."""
    return {name: tensor + (tuned[name].to(tensor) - tensor) / (seen + 1) for name, tensor in merged.items()}


class Average(WeightMethod):
    """θ_t = mean of the t fine-tuned models; the base takes no part."""

    name = "average"

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        return running_mean(self.merged, dict(arrival.tuned), arrival.index), {}
