"""Test-time adaptation: train the newest gates to answer as the task's own model does, on a few unlabelled samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from mingle.layers import MingleLinear
from mingle.relaxation import RelaxedProjector
from mingle.tasks import TaskData, TaskType

logger = logging.getLogger(__name__)

#: After this many losses in a row that are not finite, adaptation gives up.
PATIENCE = 3


class AdaptationDiverged(RuntimeError):
    """The loss stayed non-finite; the gates are those of the last good step."""


@dataclass(frozen=True)
class AdaptConfig:
    """steps of Adam at learning rate lr over batches of batch_size; temperature of both soft-maxes in the loss."""

    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    temperature: float = 2.0


@dataclass
class AdaptTrace:
    """What happened at every step: the loss, and per layer the means of S and λ over the basis directions (none without a basis)."""

    loss: list[float] = field(default_factory=list)
    interference: dict[str, list[float]] = field(default_factory=dict)
    strength: dict[str, list[float]] = field(default_factory=dict)

    def record(self, loss: float, projector: RelaxedProjector | None) -> None:
        self.loss.append(loss)
        if projector is None:
            return
        for series, values in ((self.interference, projector.interference()), (self.strength, projector.strength())):
            for name, value in values.items():
                if len(value):
                    series.setdefault(name, []).append(value.mean().item())


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """−(1/n) Σ softmax(teacher / τ) · log_softmax(student / τ) over logits [n, C]; no factor τ²."""
    return -(torch.softmax(teacher / temperature, -1) * torch.log_softmax(student / temperature, -1)).sum(-1).mean()


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless index batches [size] that pass through all `count` samples in a new random order each time."""
    queue = torch.empty(0, dtype=torch.long)
    size = min(size, count)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


@torch.no_grad()
def teacher_logits(task: TaskType, teacher: nn.Module, seeds: TaskData, batch_size: int) -> torch.Tensor:
    """The fine-tuned model's logits [n, C] for all seed samples, once."""
    return torch.cat([task.logits(teacher, batch) for batch in seeds.batches(batch_size)])


def adapt_gates(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    seeds: TaskData,
    targets: torch.Tensor,
    config: AdaptConfig,
    generator: torch.Generator,
    projector: RelaxedProjector | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> AdaptTrace:
    """Train the trainable gates of `layers` in place.

    Args:
        task: how the model's logits are computed.
        model: the merged model that holds the layers.
        layers: the injected layers by name.
        seeds: unlabelled samples of the new task.
        targets: the teacher's logits [n, C] for them.
        config: optimizer settings.
        generator: draws the batches.
        projector: keeps gate gradients out of earlier tasks' input directions; None trains unconstrained.
        on_step: called after every step with its index and loss.

    Raises:
        AdaptationDiverged: the loss was not finite for three steps in a row; the gates are back at the last good step.
    """
    gates = [p for layer in layers.values() for p in (layer.gate_weight, layer.gate_bias)]
    for gate in gates:
        gate.grad = torch.zeros_like(gate)  # a layer the loss does not reach keeps a zero gradient, not none
    optimizer = torch.optim.Adam(gates, lr=config.lr)
    trace = AdaptTrace()
    bad_steps = 0
    batches = shuffled_batches(len(seeds), config.batch_size, generator)
    for step, index in zip(range(config.steps), batches, strict=False):
        loss = distillation_loss(task.logits(model, seeds.select(index)), targets[index].to(gates[0].device), config.temperature)
        optimizer.zero_grad(set_to_none=False)
        finite = bool(loss.isfinite())
        if finite:
            loss.backward()
            finite = _step(optimizer, layers, projector)
        bad_steps = 0 if finite else bad_steps + 1
        if bad_steps == PATIENCE:
            raise AdaptationDiverged(f"the loss or its gradient was not finite for {PATIENCE} steps, last at step {step + 1}")
        trace.record(loss.item(), projector)
        if on_step is not None:
            on_step(step, trace.loss[-1])
    return trace


def _step(optimizer: torch.optim.Optimizer, layers: Mapping[str, MingleLinear], projector: RelaxedProjector | None) -> bool:
    """One projected optimizer step; False, and nothing changed, where a gradient is not finite."""
    weights = {name: layer.gate_weight.grad for name, layer in layers.items() if layer.gate_weight.grad is not None}
    biases = [layer.gate_bias.grad for layer in layers.values() if layer.gate_bias.grad is not None]
    if not all(gradient.isfinite().all() for gradient in [*weights.values(), *biases]):
        return False
    if projector is not None:
        projector.apply_(weights)
    optimizer.step()
    return True
