"""Test-time adaptation: the trainable gates of a model learn from a few unlabelled samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mingle import ranks
from mingle.adaptation import fast_forward
from mingle.adaptation.answers import Compact, States
from mingle.adaptation.batches import Share, shared
from mingle.adaptation.learning_rates import learning_rates
from mingle.adaptation.losses import Loss
from mingle.adaptation.optimizer import Advance, GateStep, captured
from mingle.adaptation.prefix_cache import frozen_prefix
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.adaptation.trace import AdaptTrace, Recorder, StepProgress
from mingle.kernels.dtypes import wide
from mingle.nn.linear import MingleLinear
from mingle.nn.sharded import is_sharded
from mingle.tasks import TaskData, TaskType

#: Steps between two looks at the results, each of which has to wait for a GPU.
_INTERVALS = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class AdaptConfig:
    """How the gates are trained.

    Attributes:
        steps: the number of steps of Adam.
        lr: its learning rate; ``auto`` goes by what the gates see, see `mingle.adaptation.learning_rates`.
        batch_size: samples per step.
        micro_batch_size: of these, how many pass through the model at once; None for all.  Gradients are
            those of the whole batch but for rounding, and a step needs less memory.
        precision: of the model's products: ``"fp32"``, or ``"bf16"`` under autocast.  Gates, their gradients
            and attention on CPUs are fp32 either way.

    Raises:
        ValueError: an unknown precision.
    """

    steps: int = 50
    lr: float | Literal["auto"] = 1e-4
    batch_size: int = 16
    micro_batch_size: int | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in fast_forward.PRECISIONS:
            expected = ", ".join(fast_forward.PRECISIONS)
            raise ValueError(f"precision={self.precision!r}: expected one of {expected}")


def adapt_gates(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    seeds: TaskData,
    loss: Loss,
    config: AdaptConfig,
    generator: torch.Generator,
    projector: RelaxedProjector | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
) -> AdaptTrace:
    """Train the trainable gates of `layers` in place.

    Of several processes, see `mingle.ranks`, each takes its share of every batch, and all make the same step.

    Args:
        task: how the model's logits are computed.
        model: the merged model that holds the layers, in evaluation mode.
        layers: the injected layers by name.
        seeds: unlabelled samples of the new task.
        loss: what the gates minimise, see `mingle.adaptation.losses`; given the samples that any step uses.
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
    batches = shared(task, model, seeds, config.batch_size, config.steps, generator, config.micro_batch_size)
    lr = learning_rates(task, model, layers, batches.samples) if config.lr == "auto" else config.lr
    step = GateStep(layers, lr, projector)
    recorder = Recorder(step)
    with _stepping(task, model, layers, batches.own.to(device), loss, config, step) as advance:
        taken = [
            [share._replace(samples=share.samples.to(device)) for share in passes] for passes in batches.taken
        ]
        if device.type == "cuda" and ranks.size() == len(taken[0]) == 1:
            advance = captured(advance, step, len(taken[0][0].samples), device)
        _take(advance, taken, recorder, device, on_step)
    return recorder.trace()


@contextmanager
def _stepping(
    task: TaskType,
    model: nn.Module,
    layers: Mapping[str, MingleLinear],
    samples: TaskData,
    loss: Loss,
    config: AdaptConfig,
    step: GateStep,
) -> Iterator[Advance]:
    """Yields one whole step, from what this process takes of a batch of `samples` to new gates."""
    device = step.gradients.device
    batch_loss, valid = loss(samples), task.valid(samples)
    compact = Compact.of(task, model, samples)
    together = is_sharded(model)  # then all processes pass its blocks, also those without a sample

    def head(hidden: Tensor) -> Tensor:
        assert compact is not None
        with fast_forward.running(config.precision, device):
            return compact.vocabulary.logits(hidden)

    def answers(chosen: Tensor | slice) -> Tensor | States:
        with fast_forward.running(config.precision, device):
            batch = samples.select(chosen)
            return task.logits(model, batch) if compact is None else compact.states(batch, head)

    kept = frozen_prefix(model, layers.values(), answers, len(samples), TEACHER_BATCH)
    with fast_forward.prepared(model, config.precision), kept as select:

        def advance(passes: Sequence[Share]) -> tuple[Tensor, Tensor]:
            step.zero_grad()
            value = step.gradients.new_zeros(())
            for index, weight in passes:
                if not (weight or together):
                    continue
                select(index)
                student = answers(index)
                if isinstance(student, Tensor):
                    student = student.to(wide(student))
                if weight:
                    part = weight * batch_loss(student, index, None if valid is None else valid[index])
                else:  # its mean may be over nothing
                    part = 0 * (student if isinstance(student, Tensor) else student.hidden).sum()
                part.backward()
                value = value + part.detach()
            skipped = step.step(value)
            return step.loss, skipped

        yield advance


def _take(
    advance: Advance,
    batches: Sequence[Sequence[Share]],
    recorder: Recorder,
    device: torch.device,
    on_step: Callable[[StepProgress], None] | None,
) -> None:
    """Take all steps, and look at the results every so often."""
    interval, steps = _INTERVALS.get(device.type, 8), len(batches)
    for done, passes in enumerate(batches, 1):
        recorder.note(*advance(passes))
        if done % interval == 0 or done == steps:
            recorder.look()
            if on_step is not None:
                on_step(recorder.progress(steps))
