"""Which task a sample belongs to, by Gaussians over features of the base: no training, no labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mingle import linalg

#: The share of a leverage that leaving a sample out may take; beyond it the estimate without it is useless.
_LEVERAGE = 0.99


class FeatureStatistics(NamedTuple):
    """The Gaussian of one task's features, which reveals no single sample.

    Attributes:
        mean: [F].
        factor: [m, F], with covariance = factorᵀ factor.
        samples: of how many it is, [].
    """

    mean: Tensor
    factor: Tensor
    samples: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """The statistics of features [n, F], n ≥ 2; in float64, with m = min(n, F) rows.

        Raises:
            ValueError: fewer than two samples, or features that are not finite.
        """
        if len(features) < 2:
            raise ValueError(
                f"{len(features)} seed samples: a router needs at least two to measure how features vary; "
                "give more (samples_per_class)"
            )
        if not features.isfinite().all():
            raise ValueError("the base model's features of the seed samples are not finite")
        features = features.double()
        mean = features.mean(0)
        _, S, Vh = torch.linalg.svd((features - mean) / (len(features) - 1) ** 0.5, full_matrices=False)
        factor = (S.unsqueeze(1) * Vh).contiguous()  # as it will be read from a file
        return cls(mean, factor, torch.tensor(len(features), device=features.device))

    def part(self, width: int) -> FeatureStatistics:
        """Those of the first features alone."""
        return FeatureStatistics(self.mean[:width], self.factor[:, :width], self.samples)

    @property
    def variances(self) -> Tensor:
        """[F]."""
        return self.factor.square().sum(0)


class FeatureSpace:
    """The features of several tasks in the coordinates in which their mean covariance is diagonal.

    Features are first divided by their standard deviation within tasks, averaged over tasks; one that never
    varies says nothing.  There are k = min(F, Σ m) coordinates; in all other directions the covariance is 0.

    Args:
        tasks: their statistics, oldest first.
    """

    def __init__(self, tasks: Sequence[FeatureStatistics]) -> None:
        deviation = torch.stack([task.variances for task in tasks]).mean(0).sqrt()
        self.scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        self.means = torch.stack([task.mean for task in tasks]) * self.scale
        self.counts = torch.stack([task.samples for task in tasks]).double()
        factors = [task.factor * self.scale for task in tasks]
        _, S, self.directions = linalg.gram_svd(torch.cat(factors) * len(tasks) ** -0.5)
        #: the covariance's eigenvalues [k], and each task's factor in coordinates [m, k]
        self.values = S.square()
        self.factors = [factor @ self.directions.mT for factor in factors]


class GaussianRouter:
    """Log-likelihood of every task under its predictive Gaussian, up to a constant.

        −½ (φ − μ_t)ᵀ Q_t⁻¹ (φ − μ_t) / v_t − ½ log det (v_t Q_t),    v_t = 1 + 1/n_t

    For features as they are scaled in a `FeatureSpace`,

        Q_t = (1 − s) ((1 − a) C + a C_t) + s I

    blends the mean covariance C of all tasks with the task's own C_t, which few samples determine too badly
    to be used alone (regularised discriminant analysis; Friedman, JASA 84, 1989); v_t is what is added to it
    because μ_t too is an estimate, from n_t samples.  All in float64.

    Args:
        space: the tasks' features.
        own: a, the weight of the task's own covariance.
        shrinkage: s, the weight of the identity.
    """

    def __init__(self, space: FeatureSpace, *, own: float, shrinkage: float) -> None:
        self.space, self.own, self.shrinkage = space, own, shrinkage
        blend = (1 - shrinkage) * (1 - own) * space.values + shrinkage
        self._whitening = blend.rsqrt().unsqueeze(1) * space.directions  # [k, F]
        self._centres = space.means @ self._whitening.mT
        # Q_t⁻¹ = K⁻¹ − K⁻ᵀᐟ² Vᵀ V K⁻¹ᐟ² with K the blend: a correction of rank m for the task's own share
        self._corrections, self._log_dets = [], []
        for factor in space.factors:
            rows = (
                ((1 - shrinkage) * own) ** 0.5 * factor[: len(factor) if own else 0] * blend.rsqrt()
            )  # [m, k]
            root = torch.linalg.cholesky(
                torch.eye(len(rows), dtype=rows.dtype, device=rows.device) + rows @ rows.mT
            )
            self._corrections.append(torch.linalg.solve_triangular(root, rows, upper=False))
            self._log_dets.append(2 * root.diagonal().log().sum())

    def scores(self, features: Tensor) -> Tensor:
        """Log-likelihoods [n, T] of features [n, F]."""
        whitened, elsewhere = self._coordinates(features)
        columns = []
        for t, centre in enumerate(self._centres):
            z = whitened - centre
            columns.append(self._log_likelihood(self._product(t, z, z) + elsewhere[:, t], t))
        return torch.stack(columns, 1)

    def scores_left_out(self, features: Tensor) -> Tensor:
        """Log-likelihoods [n, T] of the newest task's own samples, each as if it had not been among them.

        What a sample adds to its task's mean and to all covariances is taken back by rank-one updates
        (Sherman and Morrison, 1950); that C_t of one sample less is larger by a factor (n − 1) / (n − 2), and
        that features would be scaled otherwise, is left out.

        Args:
            features: [n, F], those that the newest task's statistics were made of.
        """
        n, tasks = len(features), len(self._centres)
        newest = tasks - 1
        whitened, elsewhere = self._coordinates(features)
        deviations = whitened - self._centres[newest]
        removed = (1 - self.shrinkage) * n / ((n - 1) * max(n - 2, 1))
        columns = []
        for t, centre in enumerate(self._centres):
            weight = removed * ((1 - self.own) / tasks + (self.own if t == newest else 0.0))
            z = n / (n - 1) * deviations if t == newest else whitened - centre
            leverage = weight * self._product(t, deviations, deviations)
            kept = 1 - leverage.clamp_max(_LEVERAGE)
            distance = self._product(t, z, z) + elsewhere[:, t]
            distance = distance + weight * self._product(t, z, deviations).square() / kept
            columns.append(self._log_likelihood(distance, t, less=int(t == newest)) - kept.log() / 2)
        return torch.stack(columns, 1)

    def _coordinates(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened coordinates [n, k], and the squared distances to all means outside of them, [n, T]."""
        scaled = features.double() * self.space.scale
        if len(self.space.directions) == len(self.space.scale):
            return scaled @ self._whitening.mT, scaled.new_zeros(len(scaled), len(self._centres))
        inside = self.space.directions.mT
        whole, part = (
            torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
            for x, y in ((scaled, self.space.means), (scaled @ inside, self.space.means @ inside))
        )
        return scaled @ self._whitening.mT, (whole - part).clamp_min(0) / self.shrinkage

    def _product(self, t: int, x: Tensor, y: Tensor) -> Tensor:
        """x Q_t⁻¹ y [n] of x and y [n, k] in whitened coordinates."""
        V = self._corrections[t]
        return (x * y).sum(1) - ((x @ V.mT) * (y @ V.mT)).sum(1)

    def _log_likelihood(self, distance: Tensor, t: int, less: int = 0) -> Tensor:
        """Of samples at these squared distances [n] from task t, which is known by `less` fewer samples."""
        v = 1 + 1 / (self.space.counts[t] - less)
        return -0.5 * (distance / v + self._log_dets[t] + len(self.space.scale) * v.log())


def strangeness(features: Tensor, mean: Tensor, variances: Tensor) -> Tensor:
    """How far features [n, F] are from a task: the mean over features of (φ − μ)² / σ², [n].

    σ² are the task's own variances.  The mean over a task's own samples is 1, however many features there
    are.

    Args:
        features: [n, F].
        mean: μ [F], or [n, F] for samples of different tasks.
        variances: σ², of the same shape.
    """
    squares = torch.where(variances > 0, (features.double() - mean).square() / variances, 0.0)
    return squares.sum(1) / (variances > 0).expand_as(features).sum(1).clamp_min(1)


def strangeness_left_out(features: Tensor, task: FeatureStatistics) -> Tensor:
    """`strangeness` [n] of a task's own samples [n, F], each as if it had not been among them."""
    n = len(features)
    squares = (features.double() - task.mean).square()
    variances = ((n - 1) * task.variances - n / (n - 1) * squares).clamp_min(0) / max(n - 2, 1)
    # a feature that no other sample varies in says nothing
    ratios = torch.where(variances > 0, squares * (n / (n - 1)) ** 2 / variances, 0.0)
    return ratios.sum(1) / (variances > 0).sum(1).clamp_min(1)
