"""What makes the scores of one task's classes comparable with those of another's."""

from __future__ import annotations

from torch import Tensor


def calibration(scores: Tensor) -> list[float]:
    return [1.0]


def joint(scores, calibrations):
    return [part.amax(1) for part in scores]
