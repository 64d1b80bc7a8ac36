"""Learning rates in units of gates: how far a step of Adam moves one, whatever the width of its layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.kernels.gated_experts import reference
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import observed
from mingle.tasks import TaskData, TaskType
from mingle.tasks.shares import own_batches

#: how far a step may move the gate of a usual input
STEP = 0.1
_BATCH = 16


@torch.no_grad()
def learning_rates(
    task: TaskType, model: nn.Module, layers: Mapping[str, MingleLinear], samples: TaskData
) -> dict[str, float]:
    """The learning rate of every layer's gates with which a step moves them by up to `STEP`.

    A step of Adam moves every weight by about its learning rate, whatever the size of the gradient, and so a
    gate w · x + b by up to lr (‖x‖₁ + 1): with layers twice as wide, or inputs twice as large, a learning
    rate means twice as much.  ‖x‖₁ is the mean over what the gates see of the samples.

    Args:
        task: how the model is run.
        model: holds the layers.
        layers: the layers by name.
        samples: seed samples.
    """
    device = next(iter(layers.values())).weight.device
    # of every layer, ‖x‖₁ and how many x there are
    sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in layers}

    def collect(name: str, layer: MingleLinear, x: Tensor) -> None:
        mask = layer.counted(x)
        norms = reference.pooled_input(x, layer.reduce, mask).abs().sum(-1)
        if mask is not None and layer.reduce == "token":
            valid = mask
        else:
            valid = torch.ones_like(norms, dtype=torch.bool)
        sums[name] += torch.stack([torch.where(valid, norms, 0).sum().double(), valid.sum().double()])

    with observed(layers, collect):
        for batch in own_batches(model, samples, _BATCH):
            task.logits(model, batch.to(device))
    ranks.sum_(*sums.values())
    return {name: STEP / (float(total / count.clamp_min(1)) + 1) for name, (total, count) in sums.items()}
