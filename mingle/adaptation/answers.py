"""What models answer to samples, where whole logits of a large vocabulary would fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mingle.kernels.dtypes import wide
from mingle.tasks import TaskData, TaskType
from mingle.tasks.vocabulary import Vocabulary, output_embeddings

#: the largest size, in bytes, of whole logits of all samples in float32
BUDGET = 2**25
#: where whole ones would be larger, the logits that are made at a time take no more bytes than this in
#: float32, or than the batch's hidden states: these are a small part of what a step has to keep
CHUNK = 2**23

#: hidden states [r, d] → logits [r, V]
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class States:
    """Answers as hidden states, of which a head makes logits.

    Attributes:
        hidden: those of the positions that count, [n, M, d], as many for each as the sample with most has.
        counted: which of them do count, bool [n, M].
        head: makes logits of hidden states.
        size: how many logits there are for each position, V.
        learning: the tensors that the head makes them with and that learn.
    """

    hidden: Tensor
    counted: Tensor
    head: Head
    size: int
    learning: tuple[Tensor, ...] = ()

    def select(self, index: Tensor) -> States:
        """Those of the samples at `index`."""
        return replace(self, hidden=self.hidden[index], counted=self.counted[index])


class Compact:
    """How a model answers with `States`.

    Args:
        task: the task type.
        model: the model.
        vocabulary: its head.
        valid: which positions of any sample's answers count, bool [n, L].
    """

    def __init__(self, task: TaskType, model: nn.Module, vocabulary: Vocabulary, valid: Tensor) -> None:
        self.task, self.model, self.vocabulary = task, model, vocabulary
        self.most = int(valid.sum(1).max())

    @classmethod
    def of(cls, task: TaskType, model: nn.Module, samples: TaskData) -> Compact | None:
        """For samples whose whole logits would be too large; None where they are not, or there is no way."""
        valid, output = task.valid(samples), output_embeddings(model)
        # Looking for a head takes passes of the model, which small answers are spared.
        if valid is None or (output is not None and 4 * len(output.weight) * valid.numel() <= BUDGET):
            return None
        vocabulary = task.vocabulary(model, samples)
        if vocabulary is None or 4 * vocabulary.size * valid.numel() <= BUDGET:
            return None
        return cls(task, model, vocabulary, valid)

    def states(self, samples: TaskData, head: Head | None = None) -> States:
        """The answers to some of the samples.

        Args:
            samples: the samples.
            head: stands in for the model's own, and learns nothing.
        """
        hidden, valid = self.task.states(self.model, self.vocabulary, samples), self.task.valid(samples)
        assert valid is not None
        places = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.most].to(hidden.device)
        chosen = hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2]))
        counted = valid.to(hidden.device).gather(1, places)
        vocabulary = self.vocabulary
        if head is not None:
            return States(chosen, counted, head, vocabulary.size)
        return States(chosen, counted, vocabulary.logits, vocabulary.size, vocabulary.learning())


def joined(parts: list[States]) -> States:
    """The states of consecutive batches of samples as those of all."""
    hidden = torch.cat([part.hidden for part in parts])
    return replace(parts[0], hidden=hidden, counted=torch.cat([part.counted for part in parts]))


def mean_over_positions(states: States, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean of a loss over the positions that count.

    Logits are made a few positions at a time, and forgotten after their gradients were taken at once: those
    with respect to the hidden states and to what learns of the head.

    Args:
        states: of one batch.
        loss: positions among the batch's [b · M], as indices [r], and their logits [r, V] in float32 or
            better → losses [r].
    """
    counted = states.counted.flatten()
    # Elsewhere than on CPUs their number is not asked for: that would wait for the device.
    places = torch.arange(len(counted), device=counted.device)
    if not counted.is_cuda:
        places = places[counted]

    rows = max(1, max(CHUNK // 4, states.hidden.numel()) // states.size)

    def summed(start: int, hidden: Tensor) -> Tensor:
        own, logits = places[start : start + len(hidden)], states.head(hidden)
        return torch.where(counted[own], loss(own, logits.to(wide(logits))), 0).sum()

    total: Tensor = _Summed.apply(rows, summed, states.hidden.flatten(0, 1)[places], *states.learning)
    return total / counted.sum()


class _Summed(torch.autograd.Function):
    """The sum of a function of hidden states [R, d] over chunks of rows, each with its gradients at once.

    The function may use other tensors, all of which learn and are passed for their gradients alone.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: int, summed: Callable[[int, Tensor], Tensor], hidden: Tensor, *others: Tensor
    ) -> Tensor:
        learns = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *others)] if learns else []
        total = hidden.new_zeros((), dtype=wide(hidden))
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                value = summed(start, part)
            if learns:
                gradients[0][start : start + rows], *more = torch.autograd.grad(value, (part, *others))
                for gradient, one in zip(gradients[1:], more, strict=True):
                    gradient += one
            total += value.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * grads[0].to(gradient) for gradient in ctx.saved_tensors)
