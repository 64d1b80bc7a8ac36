"""Probabilities of answers among the classes of all tasks, from the scores z_t [C_t] of each task's head.

Where tasks have heads of their own, whose scores no training has ever compared, each head speaks for itself:

    p(t, c | x) = exp(z_tc / τ) / Σ_c' exp(z_tc' / τ)

Where all classes are embeddings in one space, their scores are on one scale, and so all tasks share a sum:

    p(t, c | x) = exp(z_tc / τ) / Σ_t' Σ_c' exp(z_t'c' / τ)

The answer is the class of the greatest of these.  The temperature τ makes probabilities mean something.  For
each task a τ_t is measured when it is merged, on its seed samples and without labels: with it, the mean of
the greatest probability among the task's own classes is the share of the samples that the merged model
answers as the fine-tuned model does.  τ is their geometric mean, one for all: the task that was merged first,
into nothing that could disturb it, must not be surer of itself than all others for ever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: the largest |log τ_t|
_RANGE, _HALVINGS = 3.0, 30


def temperature(scores: Tensor, wanted: Tensor) -> float | None:
    """τ_t of a task; None where scores are not finite.

    Args:
        scores: of the merged model with the task's head, [n, C].
        wanted: the fine-tuned model's, [n, C].
    """
    if not scores.isfinite().all():
        return None
    scores = scores.double()
    same = int((scores.argmax(1) == wanted.argmax(1)).sum())
    share = (same + 1) / (len(scores) + 2)  # a few samples never show that nothing can go wrong
    low, high = -_RANGE, _RANGE
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        sure = (scores / math.exp(middle)).softmax(1).amax(1).mean().item()
        low, high = (middle, high) if sure > share else (low, middle)
    return math.exp(low)


def probabilities(
    scores: Sequence[Tensor], temperatures: Sequence[float | None], *, one_scale: bool
) -> list[Tensor]:
    """The probabilities of every task's classes, [n, C] for each task.

    Args:
        scores: of every task's classes, [n, C] for each task.
        temperatures: τ_t of every task; None where it was not measured.
        one_scale: whether all scores are on one scale.
    """
    known = [math.log(value) for value in temperatures if value is not None]
    common = math.exp(sum(known) / len(known)) if known else 1.0
    if one_scale:
        joined = (torch.cat(list(scores), 1) / common).softmax(1)
        return list(joined.split([part.shape[1] for part in scores], 1))
    return [(part / common).softmax(1) for part in scores]
