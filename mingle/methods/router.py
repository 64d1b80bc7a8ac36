"""Which task a sample belongs to, by Gaussians over the base's shallow features: no training, no labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class FeatureStatistics(NamedTuple):
    """The Gaussian of one task's features, which reveals no single sample.

    Attributes:
        mean: [F].
        factor: [m, F], with covariance = factorᵀ factor.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features [n, F], n ≥ 2; in float64, with m = min(n, F) rows.

        Raises:
            ValueError: fewer than two samples, or features that are not finite.
        """
        if len(features) < 2:
            raise ValueError(
                f"{len(features)} seed samples: a router needs at least two to measure how features vary"
            )
        if not features.isfinite().all():
            raise ValueError("the base model's features of the seed samples are not finite")
        features = features.double()
        mean = features.mean(0)
        _, S, Vh = torch.linalg.svd((features - mean) / (len(features) - 1) ** 0.5, full_matrices=False)
        return cls(mean, S.unsqueeze(1) * Vh)


class GaussianRouter:
    """Log-likelihood of every task: −½ (φ − μ_t)ᵀ Q_t⁻¹ (φ − μ_t) − ½ log det Q_t, up to a constant.

    Features are divided by their standard deviation within tasks, averaged over tasks.  Then

        Q_t = (1 − s) ((1 − a) C + a C_t) + s I

    blends the mean covariance C of all tasks with the task's own C_t, which few samples determine too badly
    to be used alone (regularised discriminant analysis; Friedman, JASA 84, 1989).  All in float64.

    Args:
        tasks: their statistics, oldest first.
        own: a, the weight of the task's own covariance.
        shrinkage: s, the weight of the identity.
    """

    def __init__(
        self, tasks: Sequence[FeatureStatistics], *, own: float = 0.1, shrinkage: float = 0.03
    ) -> None:
        self.means = torch.stack([task.mean for task in tasks])
        self.variances = torch.stack([task.factor.square().sum(0) for task in tasks])
        factors = [task.factor for task in tasks]
        deviation = self.variances.mean(0).sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)  # a feature that never varies says nothing
        factors = [factor * scale for factor in factors]
        shared = torch.cat(factors) * len(tasks) ** -0.5
        identity = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        blend = (1 - shrinkage) * (1 - own) * (shared.mT @ shared) + shrinkage * identity
        whitening = torch.linalg.inv_ex(torch.linalg.cholesky(blend))[0]
        self._project = (whitening * scale).mT  # [F, F]
        self._centres = self.means @ self._project
        # Q_t⁻¹ = K⁻¹ − K⁻ᵀᐟ² Vᵀ V K⁻¹ᐟ² with K the blend: a correction of rank m for the task's own share
        self._corrections, self._log_dets = [], []
        for factor in factors:
            own_rows = ((1 - shrinkage) * own) ** 0.5 * factor @ whitening.mT  # [m, F]
            root = torch.linalg.cholesky(
                torch.eye(len(factor), dtype=factor.dtype, device=factor.device) + own_rows @ own_rows.mT
            )
            self._corrections.append(torch.linalg.solve_triangular(root, own_rows, upper=False))
            self._log_dets.append(2 * root.diagonal().log().sum())

    def scores(self, features: Tensor) -> Tensor:
        """Log-likelihoods [n, T] of features [n, F]."""
        whitened = features.double() @ self._project
        columns = []
        for centre, correction, log_det in zip(self._centres, self._corrections, self._log_dets, strict=True):
            z = whitened - centre
            columns.append(-0.5 * (z.square().sum(1) - (z @ correction.mT).square().sum(1) + log_det))
        return torch.stack(columns, 1)

    def strangeness(self, features: Tensor, tasks: Tensor) -> Tensor:
        """How far features [n, F] are from tasks [n]: the mean over features of (φ − μ)² / σ², [n].

        σ² are the task's own variances.  The mean over a task's seed samples is 1, and hardly more over other
        samples of its kind, however many features there are.
        """
        variances = self.variances[tasks]
        squares = torch.where(
            variances > 0, (features.double() - self.means[tasks]).square() / variances, 0.0
        )
        return squares.sum(1) / (variances > 0).sum(1).clamp_min(1)
