"""The answers of a task's own model, which the merged model learns to give too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mingle.adaptation.answers import Compact, States, joined
from mingle.adaptation.fast_forward import fast_linears
from mingle.tasks import TaskData, TaskType

#: Samples in one pass of the teacher, and of what precedes the first expert.
TEACHER_BATCH = 128


@torch.no_grad()
def teacher_answers(task: TaskType, teacher: nn.Module, seeds: TaskData, batch_size: int) -> Tensor | States:
    """The fine-tuned model's answers to all seed samples, once.

    They are logits [n, C] or [n, L, C], or `States` where these would be too large.
    """
    with fast_linears(teacher):
        compact = Compact.of(task, teacher, seeds)
        if compact is not None:
            return joined([compact.states(batch) for batch in seeds.batches(batch_size)])
        return torch.cat([task.logits(teacher, batch) for batch in seeds.batches(batch_size)])
