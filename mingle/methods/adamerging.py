"""Continual layer-wise AdaMerging (Yang et al., 2024): every tensor of a task vector has its coefficient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mingle import ranks
from mingle.adaptation.answers import Compact
from mingle.adaptation.batches import Share, shared
from mingle.adaptation.divergence import ADVICE, PATIENCE, AdaptationDiverged
from mingle.adaptation.losses import entropy
from mingle.adaptation.trace import AdaptTrace, StepProgress
from mingle.io.state_dicts import task_vector
from mingle.kernels.dtypes import wide
from mingle.methods.base import Arrival, PlainMethod, StepReport, Tensors
from mingle.options import require_not_negative, require_positive
from mingle.tasks import TaskData, TaskType


@dataclass(frozen=True)
class AdaMergingOptions:
    """Settings of AdaMerging.

    Attributes:
        init: every coefficient's initial value.
        steps: the number of steps of Adam.
        lr: its learning rate.
        batch_size: seed samples per step.
        micro_batch_size: of these, how many pass through the model at once; None for all.
    """

    init: float = 0.3
    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.init <= 1:
            raise ValueError(f"init={self.init}: expected a value in [0, 1]")
        require_positive(self, "batch_size", "micro_batch_size")
        require_not_negative(self, "steps", "lr")


class _Entropy(nn.Module):
    """The loss of a batch as a module's forward pass, so that `functional_call` can replace the weights."""

    def __init__(self, task: TaskType, model: nn.Module, seeds: TaskData) -> None:
        super().__init__()
        self.task, self.model, self.seeds = task, model, seeds
        self.loss, self.compact = entropy(seeds), Compact.of(task, model, seeds)

    def forward(self, index: Tensor) -> Tensor:
        batch = self.seeds.select(index)
        if self.compact is not None:
            return self.loss(self.compact.states(batch), index, None)
        logits = self.task.logits(self.model, batch)
        return self.loss(logits.to(wide(logits)), index, self.task.valid(batch))


def combined(merged: Mapping[str, Tensor], delta: Mapping[str, Tensor], coefficients: Tensor) -> Tensors:
    """θ + c_n Δ_n for the n-th tensor, in θ's dtype; coefficients [number of tensors]."""
    return {
        name: (tensor + c * delta[name]).to(tensor)
        for (name, tensor), c in zip(merged.items(), coefficients, strict=True)
    }


def learn_coefficients(
    loss: Callable[[Tensor, Tensor], Tensor],
    coefficients: Tensor,
    batches: Sequence[Sequence[Share]],
    lr: float,
    on_step: Callable[[StepProgress], None] | None = None,
) -> tuple[Tensor, AdaptTrace]:
    """Minimise a loss over coefficients in [0, 1] with Adam.

    A coefficient that a step takes out of the interval is put back to the nearer end.  (Clamping it in the
    forward pass instead would leave it without a gradient for ever.)

    Args:
        loss: a function of the coefficients and of the indices of a batch of samples.
        coefficients: their initial values.
        batches: what this process takes of each, pass by pass.
        lr: the learning rate.
        on_step: called after every step.

    Raises:
        AdaptationDiverged: the loss or its gradient was not finite for three steps in a row; a single such
            step is left out.
    """
    learnt = coefficients.clone().requires_grad_()
    optimizer = torch.optim.Adam([learnt], lr)
    trace, bad_steps = AdaptTrace(), 0
    for done, passes in enumerate(batches, 1):
        value, learnt.grad = learnt.new_zeros(()), torch.zeros_like(learnt)
        for index, weight in passes:
            if weight:
                part = weight * loss(learnt, index)
                learnt.grad += torch.autograd.grad(part, learnt)[0]
                value += part.detach()
        ranks.sum_(value, learnt.grad)
        trace.loss.append(value.item())
        if value.isfinite() and learnt.grad.isfinite().all():
            bad_steps = 0
            optimizer.step()
            with torch.no_grad():
                learnt.clamp_(0, 1)
        else:
            bad_steps += 1
            if bad_steps == PATIENCE:
                raise AdaptationDiverged(
                    f"the loss or its gradient was not finite for {PATIENCE} steps, last at step {done}; "
                    f"{ADVICE}"
                )
        if on_step is not None:
            on_step(StepProgress(done, len(batches), trace.loss[-1], None, None))
    return learnt.detach(), trace


class AdaMerging(PlainMethod):
    """θ_t = θ_{t−1} + c_n Δ_n for every tensor n, with learnt coefficients c_n.

    They minimise the entropy of the merged model's answers to the seed samples.  Tensors that the model ties
    together have one coefficient.  With each task only its own coefficients are learnt: those of earlier
    tasks are part of θ_{t−1}, as the earlier models are gone.
    """

    name = "adamerging"
    Options = AdaMergingOptions
    needs_seeds = True

    def add(self, arrival: Arrival) -> StepReport:
        delta = task_vector(self.base, arrival.tuned, self.base)
        if not any(tensor.any() for tensor in delta.values()):
            return StepReport(skipped=f"{arrival.name}: identical to the base, nothing was merged")
        device = next(iter(self.base.values())).device
        options, generator = self.options, torch.Generator().manual_seed(arrival.seed)
        batches = shared(
            self.task,
            self.model,
            arrival.samples(),
            options.batch_size,
            options.steps,
            generator,
            options.micro_batch_size,
        )
        entropies = _Entropy(self.task, self.model, batches.own.to(device))
        places = {
            name: ".".join(filter(None, ("model", self.task.tower(self.model), name))) for name in self.merged
        }

        def loss(coefficients: Tensor, index: Tensor) -> Tensor:
            weights = combined(self.merged, delta, coefficients)
            placed = {places[name]: weight.to(self.base[name]) for name, weight in weights.items()}
            value: Tensor = functional_call(entropies, placed, (index.to(device),))
            return value

        start = torch.full((len(delta),), options.init, device=device)
        coefficients, trace = learn_coefficients(loss, start, batches.taken, options.lr, arrival.on_step)
        self.take(combined(self.merged, delta, coefficients), {})
        return StepReport(trace=trace)
