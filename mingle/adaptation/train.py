"""Test-time adaptation: train gates on a few unlabelled samples to answer as the task's own model does, or
with less entropy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.adaptation import fast_forward
from mingle.adaptation.optimizer import GateStep, captured
from mingle.adaptation.prefix_cache import frozen_prefix
from mingle.adaptation.projector import RelaxedProjector
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskData, TaskType

logger = logging.getLogger(__name__)

#: After this many steps in a row whose loss or gradient is not finite, adaptation gives up.
PATIENCE = 3
#: Samples in one pass of the teacher, and of what precedes the first expert.
TEACHER_BATCH = 128
_INTERVALS = {
    "cpu": 1,
    "cuda": 8,
}  # steps between two looks at the results, for which a GPU has to be waited for


class AdaptationDiverged(RuntimeError):
    """The loss, a gradient or the adapted model's answers were not finite, and going on would not help."""


@dataclass(frozen=True)
class AdaptConfig:
    """steps of Adam at learning rate lr over batches of batch_size; temperature of both soft-maxes in the
    loss.

    precision: of the model's products: ``"fp32"``, or ``"bf16"`` under autocast.  Gates and their gradients
        are fp32 either way, and so is
    attention on CPUs.
    """

    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    temperature: float = 2.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in fast_forward.PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r}: expected one of {', '.join(fast_forward.PRECISIONS)}"
            )


class StepProgress(NamedTuple):
    """Where an adaptation stands: steps done and to be done, the loss, and the means of S and λ over all
    layers (None without a basis).
    """

    step: int
    steps: int
    loss: float
    interference: float | None
    strength: float | None


@dataclass
class AdaptTrace:
    """What happened at every step: the loss, and per layer the means of S and λ over the basis directions
    (none without a basis).
    """

    loss: list[float] = field(default_factory=list)
    interference: dict[str, list[float]] = field(default_factory=dict)
    strength: dict[str, list[float]] = field(default_factory=dict)


class _Recorder:
    """Notes every step on the device, where nothing waits for it; read when it is looked at."""

    def __init__(self, step: GateStep) -> None:
        self.step, self.projector = step, step.projector
        self.blocks = [block for block in step.layout.blocks if block.directions]
        self.losses: list[Tensor] = []
        self.means: list[Tensor] = []  # per step [2, L]: S and λ
        self.skips: list[
            Tensor
        ] = []  # whether each step since the last look was skipped, and then which gradients were finite
        self.finite: list[Tensor] = []
        self.skipped_in_a_row = 0

    def note(self, loss: Tensor, skipped: Tensor) -> None:
        self.losses.append(loss.detach().clone())
        self.skips.append(skipped.clone())
        self.finite.append(self.step.finite())
        if self.blocks:
            S = [block.places(self.projector.interferences) for block in self.blocks]
            strength = [torch.exp(-self.projector.gamma * s) for s in S]
            self.means.append(
                torch.stack([torch.cat([values.mean(1) for values in part]) for part in (S, strength)])
            )

    def look(self) -> None:
        """Report what kept steps since the last look from being made.

        Raises:
            AdaptationDiverged: that has happened too often in a row.
        """
        done = len(self.losses) - len(self.skips)
        skips, finite = torch.stack(self.skips).tolist(), torch.stack(self.finite)
        self.skips, self.finite = [], []
        for i, skipped in enumerate(skips):
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            broken = (
                [name for name, whole in zip(self.step.names, finite[i].tolist(), strict=True) if not whole]
                if skipped
                else []
            )
            if broken:
                self.projector.report(broken, done + i + 1)
            if self.skipped_in_a_row >= PATIENCE:
                raise AdaptationDiverged(
                    f"the loss or its gradient was not finite for {PATIENCE} steps, last at step {done + i + 1}"
                )

    def progress(self, steps: int) -> StepProgress:
        means = self.means[-1].mean(1).tolist() if self.means else (None, None)
        return StepProgress(len(self.losses), steps, self.losses[-1].item(), *means)

    def trace(self) -> AdaptTrace:
        trace = AdaptTrace(torch.stack(self.losses).tolist() if self.losses else [])
        if self.means:
            names = [name for block in self.blocks for name in block.names]
            by_layer = torch.stack(self.means).permute(1, 2, 0).tolist()  # [2][L][steps]
            trace.interference, trace.strength = (
                dict(zip(names, series, strict=True)) for series in by_layer
            )
        return trace


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """The mean over rows of −softmax(teacher / τ) · log_softmax(student / τ), logits [..., C]; no factor τ².

    Args:
        student, teacher: logits [..., C].
        temperature: τ.
        valid: bool [...], true for the rows that count; None counts all.
    """
    return _mean(
        -(torch.softmax(teacher / temperature, -1) * torch.log_softmax(student / temperature, -1)).sum(-1),
        valid,
    )


def entropy_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over rows of −Σ p ln p with p = softmax(logits), logits [..., C]; of those where `valid` [...]
    is true, if it is given.
    """
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


def _drawn(count: int, config: AdaptConfig, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """The samples that some step uses, rising [m], and every step's batch as places among them."""
    batches = list(islice(shuffled_batches(count, config.batch_size, generator), config.steps))
    used = torch.cat(batches).unique()
    return used, [torch.searchsorted(used, batch) for batch in batches]


@torch.no_grad()
def teacher_logits(task: TaskType, teacher: nn.Module, seeds: TaskData, batch_size: int) -> Tensor:
    """The fine-tuned model's logits [n, C] or [n, L, C] for all seed samples, once."""
    with fast_forward.fast_linears(teacher):
        return torch.cat([task.logits(teacher, batch) for batch in seeds.batches(batch_size)])


def adapt_gates(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    seeds: TaskData,
    targets: Tensor | Callable[[TaskData], Tensor] | None,
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
        targets: the teacher's logits for them, [n, C] or [n, L, C], which the model is to give as well, or a
            function that says them for the samples that some step uses; None lowers the entropy of the
            model's own instead.
        config: optimizer settings.
        generator: draws the batches.
        projector: keeps gate gradients out of earlier tasks' input directions; None trains unconstrained.
        on_step: called after every step; on a GPU, which it would hold up, after every eighth.

    Raises:
        AdaptationDiverged: the loss or a gradient was not finite for three steps in a row; the gates are
            those of the last good step.
    """
    if config.steps == 0:
        return AdaptTrace()
    device = next(iter(layers.values())).weight.device
    used, batches = _drawn(len(seeds), config, generator)
    if len(used) < len(seeds):
        seeds = seeds.select(used)
        targets = targets[used] if isinstance(targets, Tensor) else targets
    seeds = seeds.to(device)
    if targets is not None:
        targets = (targets if isinstance(targets, Tensor) else targets(seeds)).to(device)
    valid = task.valid(seeds)
    step = GateStep(layers, config.lr, projector)
    recorder = _Recorder(step)

    def logits(chosen: Tensor | slice) -> Tensor:
        with fast_forward.running(config.precision, device):
            return task.logits(model, seeds.select(chosen))

    kept = frozen_prefix(model, layers.values(), logits, len(seeds), TEACHER_BATCH)
    with fast_forward.prepared(model, config.precision), kept as select:

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

        one_step = captured(advance, step, len(batches[0]), device) if device.type == "cuda" else advance
        interval = _INTERVALS.get(device.type, 8)
        for done, index in enumerate(batches, 1):
            recorder.note(*one_step(index.to(device)))
            if done % interval == 0 or done == config.steps:
                recorder.look()
                if on_step is not None:
                    on_step(recorder.progress(config.steps))
    return recorder.trace()
