"""The course of an adaptation: noted on the device at every step, read only now and then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.adaptation.divergence import ADVICE, PATIENCE, AdaptationDiverged
from mingle.adaptation.optimizer import GateStep


class StepProgress(NamedTuple):
    """Where an adaptation stands.

    Attributes:
        step: how many steps are done.
        steps: how many there will be.
        loss: at the last of them.
        interference, strength: the means of S and λ over all layers; None without a basis.
    """

    step: int
    steps: int
    loss: float
    interference: float | None
    strength: float | None


@dataclass
class AdaptTrace:
    """What happened at every step.

    Attributes:
        loss: the loss of each step.
        interference, strength: by layer, the means of S and λ over the basis directions at each step; empty
            without a basis.
    """

    loss: list[float] = field(default_factory=list)
    interference: dict[str, list[float]] = field(default_factory=dict)
    strength: dict[str, list[float]] = field(default_factory=dict)


class Recorder:
    """Notes every step on the device, so that nothing has to wait; read now and then, by `look`."""

    def __init__(self, step: GateStep) -> None:
        self.step, self.projector = step, step.projector
        self.blocks = [block for block in step.layout.blocks if block.directions]
        self.losses: list[Tensor] = []
        self.means: list[Tensor] = []  # per step [2, L]: S and λ
        # since the last look: whether each step was skipped, and which gradients were finite
        self.skips: list[Tensor] = []
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
        """Report the steps that were skipped since the last look, and why.

        Raises:
            AdaptationDiverged: too many of them in a row.
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
                last = f"last at step {done + i + 1}"
                raise AdaptationDiverged(
                    f"the loss or its gradient was not finite for {PATIENCE} steps, {last}; {ADVICE}"
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
