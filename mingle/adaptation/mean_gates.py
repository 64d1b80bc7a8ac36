"""The gates that layers use on a task's samples, on the mean: what is left of them in a folded model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mingle.adaptation.divergence import AdaptationDiverged
from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.kernels.gated_experts import reference
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import observed
from mingle.tasks import TaskData, TaskType


@torch.no_grad()
def mean_gates(
    task: TaskType, model: nn.Module, layers: Mapping[str, MingleLinear], samples: TaskData
) -> dict[str, Tensor]:
    """The mean of every layer's gates over samples, each sample's own being the mean over its tokens.

    Args:
        task: the model's task type.
        model: the merged model.
        layers: those of its layers that have gates.
        samples: unlabelled; completed by `TaskType.prepared` where the task type asks for it.

    Returns:
        name → gates [T], in the dtype of the layer's own; layers that no sample reaches are missing.

    Raises:
        AdaptationDiverged: gates that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collect(name: str, layer: MingleLinear, x: Tensor) -> None:
        mask, gates = layer.counted(x), layer.gates(x)
        if gates.dim() > 2:
            gates = reference.pooled_input(gates, "sample", mask if gates.shape[-2] > 1 else None)
        elif mask is not None and mask.dim() == 1:  # the tokens of all samples in one dimension
            gates = gates[mask]
        mean = gates.double().flatten(0, -2).mean(0)
        sums[name] = sums.get(name, torch.zeros_like(mean)) + len(x) * mean
        counts[name] = counts.get(name, 0) + len(x)

    with observed(layers, collect):
        for batch in samples.batches(TEACHER_BATCH):
            task.logits(model, batch)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise AdaptationDiverged(f"{name}: its gates on the samples are not finite")
    return {name: (total / counts[name]).to(layers[name].gate_bias) for name, total in sums.items()}
