"""What a new task's gates minimise: the distance to its own model's answers, or their answers' entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mingle.adaptation.answers import States, mean_over_positions
from mingle.kernels.dtypes import wide
from mingle.tasks import TaskData

#: a model's answers to a batch, logits [b, C] or [b, L, C] or `States`; the positions of its samples among
#: all [b]; and which places of the answers count, bool [b, L] (None counts all) → the loss []
BatchLoss = Callable[[Tensor | States, Tensor, Tensor | None], Tensor]
#: all samples that any step will use, on the model's device → their loss, batch by batch
Loss = Callable[[TaskData], BatchLoss]


def distillation(answers: Callable[[TaskData], Tensor | States], temperature: float) -> Loss:
    """The gates learn to answer like the task's own model, which is asked once; see `distillation_loss`.

    Args:
        answers: the teacher's logits [n, C] or [n, L, C] for n samples, or its `States`, where the student's
            answers are such.
        temperature: τ of both soft-maxes.
    """

    def begin(samples: TaskData) -> BatchLoss:
        device = next(iter(samples.inputs.values())).device
        teacher = answers(samples)
        if isinstance(teacher, States):
            return _distilled_states(teacher, temperature)
        whole = teacher.to(device)

        def loss(student: Tensor | States, index: Tensor, valid: Tensor | None) -> Tensor:
            assert isinstance(student, Tensor)  # models of one kind answer alike
            return distillation_loss(student, whole[index], temperature, valid)

        return loss

    return begin


def _distilled_states(teacher: States, temperature: float) -> BatchLoss:
    def loss(student: Tensor | States, index: Tensor, _valid: Tensor | None) -> Tensor:
        assert isinstance(student, States)
        wanted = teacher.hidden[index].flatten(0, 1)

        def rows(places: Tensor, logits: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher.head(wanted[places])
            return _distances(logits, target.to(wide(target)), temperature)

        return mean_over_positions(student, rows)

    return loss


def entropy(samples: TaskData) -> BatchLoss:
    """The gates learn to answer with less entropy, whatever the answers are; see `entropy_loss`."""

    def loss(answers: Tensor | States, _index: Tensor, valid: Tensor | None) -> Tensor:
        if isinstance(answers, States):
            return mean_over_positions(answers, lambda _, logits: _entropies(logits))
        return entropy_loss(answers, valid)

    return loss


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """The mean over rows of −softmax(teacher / τ) · log_softmax(student / τ); no factor τ².

    Args:
        student, teacher: logits [..., C].
        temperature: τ.
        valid: bool [...], true for the rows that count; None counts all.
    """
    return _mean(_distances(student, teacher, temperature), valid)


def _distances(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    target = torch.softmax(teacher / temperature, -1)
    return -(target * torch.log_softmax(student / temperature, -1)).sum(-1)


def entropy_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over rows of −Σ p ln p with p = softmax(logits).

    Args:
        logits: [..., C].
        valid: bool [...], true for the rows that count; None counts all.
    """
    return _mean(_entropies(logits), valid)


def _entropies(logits: Tensor) -> Tensor:
    logs = torch.log_softmax(logits, -1)
    return -(logs.exp() * logs).sum(-1)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.mean() if valid is None else torch.where(valid, values, 0).sum() / valid.sum()
