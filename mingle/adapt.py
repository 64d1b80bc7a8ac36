"""Test-time adaptation: train gates on a few unlabelled samples to answer as the task's own model does, or with less entropy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.gate_step import GateStep, captured
from mingle.layers import MingleLinear
from mingle.prefix import frozen_prefix
from mingle.relaxation import RelaxedProjector
from mingle.tasks import TaskData, TaskType

logger = logging.getLogger(__name__)

#: After this many steps in a row whose loss or gradient is not finite, adaptation gives up.
PATIENCE = 3
PRECISIONS = ("fp32", "bf16")
#: Samples in one pass of the teacher, and of what precedes the first expert.
TEACHER_BATCH = 128
_INTERVAL = 8  # steps between two looks at a GPU's results


class AdaptationDiverged(RuntimeError):
    """The loss stayed non-finite; the gates are those of the last good step."""


@dataclass(frozen=True)
class AdaptConfig:
    """steps of Adam at learning rate lr over batches of batch_size; temperature of both soft-maxes in the loss.

    precision: of the model's products: ``"fp32"``, or ``"bf16"`` under autocast.  Gates and their gradients are fp32 either way.
    """

    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    temperature: float = 2.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")


class StepProgress(NamedTuple):
    """Where an adaptation stands: steps done and to be done, the loss, and the means of S and λ over all layers (None without a basis)."""

    step: int
    steps: int
    loss: float
    interference: float | None
    strength: float | None


@dataclass
class AdaptTrace:
    """What happened at every step: the loss, and per layer the means of S and λ over the basis directions (none without a basis)."""

    loss: list[float] = field(default_factory=list)
    interference: dict[str, list[float]] = field(default_factory=dict)
    strength: dict[str, list[float]] = field(default_factory=dict)


class _Recorder:
    """Notes every step on the device, where nothing waits for it; read when it is looked at."""

    def __init__(self, step: GateStep) -> None:
        self.projector = step.projector
        self.blocks = [block for block in step.layout.blocks if block.directions]
        self.losses: list[Tensor] = []
        self.means: list[Tensor] = []  # per step [2, L]: S and λ

    def note(self, loss: Tensor) -> None:
        self.losses.append(loss.detach().clone())
        if self.blocks:
            S = [block.places(self.projector.interferences) for block in self.blocks]
            strength = [torch.exp(-self.projector.gamma * s) for s in S]
            self.means.append(torch.stack([torch.cat([values.mean(1) for values in part]) for part in (S, strength)]))

    def progress(self, steps: int) -> StepProgress:
        means = self.means[-1].mean(1).tolist() if self.means else (None, None)
        return StepProgress(len(self.losses), steps, self.losses[-1].item(), *means)

    def trace(self) -> AdaptTrace:
        trace = AdaptTrace(torch.stack(self.losses).tolist() if self.losses else [])
        if self.means:
            names = [name for block in self.blocks for name in block.names]
            by_layer = torch.stack(self.means).permute(1, 2, 0).tolist()  # [2][L][steps]
            trace.interference, trace.strength = (dict(zip(names, series, strict=True)) for series in by_layer)
        return trace


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """The mean over rows of −softmax(teacher / τ) · log_softmax(student / τ), logits [..., C]; no factor τ².

    Args:
        student, teacher: logits [..., C].
        temperature: τ.
        valid: bool [...], true for the rows that count; None counts all.
    """
    return _mean(-(torch.softmax(teacher / temperature, -1) * torch.log_softmax(student / temperature, -1)).sum(-1), valid)


def entropy_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over rows of −Σ p ln p with p = softmax(logits), logits [..., C]; of those where `valid` [...] is true, if it is given."""
    logs = torch.log_softmax(logits, -1)
    return _mean(-(logs.exp() * logs).sum(-1), valid)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    return values.mean() if valid is None else torch.where(valid, values, 0).sum() / valid.sum()


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless index batches [size] that pass through all `count` samples in a new random order each time."""
    queue = torch.empty(0, dtype=torch.long)
    size = min(size, count)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _stop_if_diverged(step: GateStep, bad_steps: Tensor, done: int) -> None:
    """Report what kept the last step from being made, and give up where that has happened too often."""
    if bad_steps == 0:
        return
    broken = step.broken()
    if broken:
        step.projector.report(broken)
    if bad_steps >= PATIENCE:
        raise AdaptationDiverged(f"the loss or its gradient was not finite for {PATIENCE} steps, last at step {done}")


@torch.no_grad()
def teacher_logits(task: TaskType, teacher: nn.Module, seeds: TaskData, batch_size: int) -> Tensor:
    """The fine-tuned model's logits [n, C] or [n, L, C] for all seed samples, once."""
    return torch.cat([task.logits(teacher, batch) for batch in seeds.batches(batch_size)])


def adapt_gates(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    seeds: TaskData,
    targets: Tensor | None,
    config: AdaptConfig,
    generator: torch.Generator,
    projector: RelaxedProjector | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
) -> AdaptTrace:
    """Train the trainable gates of `layers` in place.

    Args:
        task: how the model's logits are computed.
        model: the merged model that holds the layers, in evaluation mode.
        layers: the injected layers by name.
        seeds: unlabelled samples of the new task.
        targets: the teacher's logits for them, [n, C] or [n, L, C], which the model is to give as well; None lowers the entropy of its
            own instead.
        config: optimizer settings.
        generator: draws the batches.
        projector: keeps gate gradients out of earlier tasks' input directions; None trains unconstrained.
        on_step: called after every step; on a GPU, which it would hold up, after every eighth.

    Raises:
        AdaptationDiverged: the loss or a gradient was not finite for three steps in a row; the gates are those of the last good step.
    """
    device = next(iter(layers.values())).weight.device
    seeds, targets = seeds.to(device), None if targets is None else targets.to(device)
    valid = task.valid(seeds)
    step = GateStep(layers, config.lr, projector)
    recorder = _Recorder(step)

    def logits(chosen: Tensor | slice) -> Tensor:
        with _autocast(config.precision, device):
            return task.logits(model, seeds.select(chosen))

    with frozen_prefix(model, layers.values(), logits, len(seeds), TEACHER_BATCH) as select:

        def advance(index: Tensor) -> tuple[Tensor, Tensor]:
            step.zero_grad()
            select(index)
            student = logits(index)
            student = student.to(torch.promote_types(student.dtype, torch.float32))
            counted = None if valid is None else valid[index]
            if targets is None:
                loss = entropy_loss(student, counted)
            else:
                loss = distillation_loss(student, targets[index], config.temperature, counted)
            loss.backward()
            return loss.detach(), step.step(loss)

        batches = shuffled_batches(len(seeds), config.batch_size, generator)
        one_step = captured(advance, step, min(config.batch_size, len(seeds)), device) if device.type == "cuda" else advance
        interval = 1 if device.type == "cpu" else _INTERVAL
        bad_steps = most = torch.zeros((), device=device)  # in a row, and the most of them
        for done, index in zip(range(1, config.steps + 1), batches, strict=False):
            loss, skipped = one_step(index.to(device))
            bad_steps = (bad_steps + 1) * skipped
            most = torch.maximum(most, bad_steps)
            recorder.note(loss)
            if done % interval == 0 or done == config.steps:
                _stop_if_diverged(step, most, done)
                if on_step is not None:
                    on_step(recorder.progress(config.steps))
    return recorder.trace()
