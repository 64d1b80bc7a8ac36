"""What a new task's gates minimise: the distance to its own model's answers, or their answers' entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mingle.tasks import TaskData

#: logits [b, C] or [b, L, C] of a batch, the positions of its samples among all [b], and which places of the
#: answers count, bool [b, L] (None counts all) → the loss []
BatchLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: all samples that any step will use, on the model's device → their loss, batch by batch
Loss = Callable[[TaskData], BatchLoss]


def distillation(answers: Callable[[TaskData], Tensor], temperature: float) -> Loss:
    """The gates learn to answer like the task's own model, which is asked once; see `distillation_loss`.

    Args:
        answers: the teacher's logits [n, C] or [n, L, C] for n samples.
        temperature: τ of both soft-maxes.
    """

    def begin(samples: TaskData) -> BatchLoss:
        device = next(iter(samples.inputs.values())).device
        teacher = answers(samples).to(device)
        return lambda student, index, valid: distillation_loss(student, teacher[index], temperature, valid)

    return begin


def entropy(samples: TaskData) -> BatchLoss:
    """The gates learn to answer with less entropy, whatever the answers are; see `entropy_loss`."""
    return lambda logits, _, valid: entropy_loss(logits, valid)


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """The mean over rows of −softmax(teacher / τ) · log_softmax(student / τ); no factor τ².

    Args:
        student, teacher: logits [..., C].
        temperature: τ.
        valid: bool [...], true for the rows that count; None counts all.
    """
    target = torch.softmax(teacher / temperature, -1)
    return _mean(-(target * torch.log_softmax(student / temperature, -1)).sum(-1), valid)


def entropy_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over rows of −Σ p ln p with p = softmax(logits).

    Args:
        logits: [..., C].
        valid: bool [...], true for the rows that count; None counts all.
    """
    logs = torch.log_softmax(logits, -1)
    return _mean(-(logs.exp() * logs).sum(-1), valid)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.mean() if valid is None else torch.where(valid, values, 0).sum() / valid.sum()
