"""The null-space constraint with adaptive relaxation (MINGLE Eqs. 8–11), for all layers at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mingle.kernels import reference

logger = logging.getLogger(__name__)


class RelaxedProjector(nn.Module):
    """Projects gate gradients away from the input directions of earlier tasks, less where the interference stays high.

    Per layer, for the gradient G [n, d] and the orthonormal basis U [d, K]:

        r_p = mean_n |G u_p| / (‖G_n‖ + 1e-12),  S ← β S + (1−β) r,  λ = exp(−γ S),  G ← G − (G U) diag(λ) Uᵀ

    S starts at 0 for every task: make a new projector then.  Under data-parallel training call `apply_` after the gradients' all-reduce,
    and once per optimizer step when gradients are accumulated.

    Args:
        bases: orthonormal columns [d, K] per layer, as a mapping by layer name or a sequence; K = 0 leaves a layer unconstrained.
        gamma: γ; 0 is the hard projector (λ = 1).
        beta: β, the memory of S.

    Raises:
        ValueError: β outside [0, 1), a negative γ, or a basis that is no matrix.
    """

    def __init__(self, bases: Mapping[str, torch.Tensor] | Sequence[torch.Tensor], gamma: float = 1.0, beta: float = 0.99) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: expected a value in [0, 1)")
        if gamma < 0:
            raise ValueError(f"gamma={gamma}: expected a value >= 0")
        self.gamma, self.beta = gamma, beta
        named = dict(bases) if isinstance(bases, Mapping) else {str(i): basis for i, basis in enumerate(bases)}
        self.names = tuple(named)
        self.skipped_steps = 0
        for i, (name, basis) in enumerate(named.items()):
            if basis.dim() != 2:
                raise ValueError(f"layer {name!r}: basis has shape {list(basis.shape)}, expected [d, K]")
            self.register_buffer(f"basis_{i}", basis.detach())
            self.register_buffer(f"interference_{i}", basis.new_zeros(basis.shape[1]))

    def basis(self, name: str) -> torch.Tensor:
        """U [d, K] of a layer."""
        return self.get_buffer(f"basis_{self.names.index(name)}")

    def interference(self) -> dict[str, torch.Tensor]:
        """S [K] of every layer."""
        return {name: self.get_buffer(f"interference_{i}") for i, name in enumerate(self.names)}

    def strength(self) -> dict[str, torch.Tensor]:
        """λ = exp(−γ S) [K] of every layer: 1 removes a direction wholly, 0 leaves it alone."""
        return {name: torch.exp(-self.gamma * s) for name, s in self.interference().items()}

    @torch.no_grad()
    def apply_(self, grads: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]) -> bool:
        """Advance S by one step and project all gradients in place.

        Args:
            grads: one gradient [n, d] per layer, keyed or ordered as the bases.

        Returns:
            False where a gradient was not finite: then nothing is projected, no S advances, and the caller should skip its optimizer
            step.  The layer is logged.

        Raises:
            ValueError: a missing or unknown layer, or a gradient whose shape does not fit its basis.
        """
        named = dict(grads) if isinstance(grads, Mapping) else {str(i): grad for i, grad in enumerate(grads)}
        if set(named) != set(self.names):
            raise ValueError(f"gradients of layers {sorted(set(named) ^ set(self.names))} are missing or unknown to this projector")
        for i, name in enumerate(self.names):
            basis, grad = self.get_buffer(f"basis_{i}"), named[name]
            if grad.dim() != 2 or grad.shape[1] != len(basis):
                raise ValueError(f"layer {name!r}: gradient has shape {list(grad.shape)}, expected [n, {len(basis)}]")
        broken = [name for name in self.names if not named[name].isfinite().all()]
        if broken:
            self.skipped_steps += 1
            logger.warning("skipped a step: the gate gradient is not finite in %s", ", ".join(broken))
            return False
        for i, name in enumerate(self.names):
            basis, interference = self.get_buffer(f"basis_{i}"), self.get_buffer(f"interference_{i}")
            if basis.shape[1] == 0:
                continue
            projected, advanced, _ = reference.relaxed_projection(named[name], basis, interference, self.gamma, self.beta)
            named[name].copy_(projected)
            interference.copy_(advanced)
        return True
