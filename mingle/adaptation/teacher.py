"""The answers of a task's own model, which the merged model learns to give too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mingle.adaptation.fast_forward import fast_linears
from mingle.tasks import TaskData, TaskType

#: Samples in one pass of the teacher, and of what precedes the first expert.
TEACHER_BATCH = 128


@torch.no_grad()
def teacher_logits(task: TaskType, teacher: nn.Module, seeds: TaskData, batch_size: int) -> Tensor:
    """The fine-tuned model's logits [n, C] or [n, L, C] for all seed samples, once."""
    with fast_linears(teacher):
        return torch.cat([task.logits(teacher, batch) for batch in seeds.batches(batch_size)])
