"""The null-space constraint with adaptive relaxation (MINGLE Eqs. 8–11), for all layers at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mingle.adaptation.layout import Layout
from mingle.kernels.dtypes import wide
from mingle.kernels.relaxed_projection import reference
from mingle.ops import dispatch
from mingle.ops.checks import check_together

logger = logging.getLogger(__name__)

#: The most directions per layer that fit a program's registers in the Triton kernels.
MOST_DIRECTIONS = 1024


class RelaxedProjector(nn.Module):
    """Projects gate gradients away from earlier tasks' input directions, less where interference stays high.

    Per layer, for the gradient G [n, d] and the orthonormal basis U [d, K]:

        r_p = mean_n |G u_p| / (‖G_n‖ + 1e-12),  S ← β S + (1−β) r,  λ = exp(−γ S),  G ← G − (G U) diag(λ) Uᵀ

    S starts at 0 for every task: make a new projector for each.  All layers are projected together: by two
    launches on a GPU, elsewhere by a few products per shape.  Under data-parallel training project after the
    gradients' all-reduce, and once per optimizer step when gradients are accumulated.

    Args:
        bases: orthonormal columns [d, K] per layer, as a mapping by layer name or a sequence; K = 0 leaves a
            layer unconstrained.  All on one device; they and S are kept in the widest of their dtypes, half
            precision in fp32.
        gamma: γ; 0 is the hard projector (λ = 1).
        beta: β, the memory of S.
        backend: ``"eager"`` takes layer after layer by the formula, ``"grouped"`` the layers of one shape
            together, ``"triton"`` all at once; ``"auto"`` the fastest that can run.

    Raises:
        ValueError: β outside [0, 1), a negative or infinite γ, an unknown backend, or a basis that is not a
            matrix.
        TypeError: bases of integers, or on different devices.
    """

    bases: Tensor
    interferences: Tensor

    def __init__(
        self,
        bases: Mapping[str, Tensor] | Sequence[Tensor],
        gamma: float = 1.0,
        beta: float = 0.99,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: expected a value in [0, 1)")
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma={gamma}: expected a finite value >= 0")
        if backend not in dispatch.BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(dispatch.BACKENDS)}")
        self.gamma, self.beta, self.backend = gamma, beta, backend
        named = (
            dict(bases) if isinstance(bases, Mapping) else {str(i): basis for i, basis in enumerate(bases)}
        )
        for name, basis in named.items():
            if basis.dim() != 2:
                raise ValueError(f"layer {name!r}: basis has shape {list(basis.shape)}, expected [d, K]")
        check_together({f"layer {name!r}: basis": basis for name, basis in named.items()})
        self.names = tuple(named)
        self.skipped_steps = 0
        # Layers of one shape lie side by side, so that one product serves them all.
        order = sorted(named, key=lambda name: named[name].shape)
        self.shapes = {name: (named[name].shape[0], named[name].shape[1]) for name in order}
        empty = torch.empty(0)
        self.register_buffer(
            "bases", torch.cat([_wide_rows(named[name]) for name in order]) if order else empty
        )
        self.register_buffer("interferences", self.bases.new_zeros(sum(k for _, k in self.shapes.values())))
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def interference(self) -> dict[str, Tensor]:
        """S [K] of every layer."""
        parts = dict(
            zip(self.shapes, self.interferences.split([k for _, k in self.shapes.values()]), strict=True)
        )
        return {name: parts[name] for name in self.names}

    def strength(self) -> dict[str, Tensor]:
        """λ = exp(−γ S) [K] of every layer: 1 removes a direction entirely, 0 leaves it alone."""
        return {name: torch.exp(-self.gamma * s) for name, s in self.interference().items()}

    def layout(self, rows: Mapping[str, int], loose: int = 0) -> Layout:
        """How gradients of n = `rows` rows per layer lie in one flat tensor.

        Behind them are `loose` numbers that are checked but not projected.
        """
        key = (*(rows[name] for name in self.shapes), loose)
        if key not in self._layouts:
            self._layouts[key] = Layout.of(self.shapes, key[:-1], loose)
        return self._layouts[key]

    @torch.no_grad()
    def project_(self, gradients: Tensor, layout: Layout) -> Tensor:
        """Advance S by one step and project all gradients in place, without waiting for a GPU.

        Args:
            gradients: all gradients in one flat tensor, in the bases' dtype and on their device.
            layout: where each layer's gradient lies, from this projector's `layout`.

        Returns:
            bool []: whether some gradient is not finite.  Then nothing has changed, and the caller should
            skip its optimizer step.

        Raises:
            ValueError: another number of gradients than the layout's.
            TypeError: gradients of another dtype than the bases, or on another device.
            RuntimeError: ``backend="triton"`` cannot run here; the message says why.
        """
        if gradients.shape != (layout.size,):
            raise ValueError(f"gradients has shape {list(gradients.shape)}, expected [{layout.size}]")
        if layout.directions and (gradients.dtype, gradients.device) != (self.bases.dtype, self.bases.device):
            raise TypeError(
                f"gradients are {gradients.dtype} on {gradients.device}, "
                f"the bases {self.bases.dtype} on {self.bases.device}"
            )
        if layout.directions and layout.rows and self._fused(gradients, layout):
            # slow to import, and not available everywhere
            from mingle.kernels.relaxed_projection import triton as relaxed_projection

            options = (self.gamma, self.beta, layout.rows, layout.directions)
            dense = gradients.contiguous()  # the kernels know of no strides
            flags = relaxed_projection.project_(
                dense, layout.table(gradients.device), self.bases, self.interferences, *options
            )
            if dense is not gradients:
                gradients.copy_(dense)
            return flags.any()
        broken = ~gradients.isfinite().all()
        for block in layout.blocks:
            parts = block.gradients(gradients), block.bases(self.bases), block.places(self.interferences)
            if block.directions == 0 or block.rows == 0 or (broken.device.type == "cpu" and broken):
                continue
            if self.backend == "eager":
                for layer in zip(*parts, strict=True):
                    self._project_layer(*layer, broken)
            else:
                self._project_block(*parts, broken)
        return broken

    def _fused(self, gradients: Tensor, layout: Layout) -> bool:
        """Whether to use the Triton kernels."""
        if self.backend not in ("auto", "triton"):
            return False
        reason = dispatch.without_triton(gradients.device, gradients.dtype)
        if reason is None and gradients.dtype != torch.float32:
            reason = f"the kernels take float32, not {str(gradients.dtype).removeprefix('torch.')}"
        if reason is None and layout.directions > MOST_DIRECTIONS:
            reason = f"the kernels take up to {MOST_DIRECTIONS} directions, not {layout.directions}"
        if reason is not None and self.backend == "triton":
            raise dispatch.BackendUnavailable(f"backend='triton' cannot run: {reason}")
        return reason is None

    def _project_layer(self, G: Tensor, U: Tensor, S: Tensor, broken: Tensor) -> None:
        projected, advanced, _ = reference.relaxed_projection(G, U.mT, S, self.gamma, self.beta)
        S.copy_(torch.where(broken, S, advanced))
        G.copy_(torch.where(broken, G, projected))

    def _project_block(self, G: Tensor, U: Tensor, S: Tensor, broken: Tensor) -> None:
        along = G @ U.mT  # [L, n, d] @ [L, d, K]
        ratio = (along.abs() / (G.norm(dim=2, keepdim=True) + 1e-12)).mean(1)
        advanced = self.beta * S + (1 - self.beta) * ratio
        along.mul_(torch.exp(-self.gamma * advanced).unsqueeze(1))
        S.copy_(torch.where(broken, S, advanced))
        G.copy_(torch.where(broken, G, torch.baddbmm(G, along, U, alpha=-1)))

    @torch.no_grad()
    def apply_(self, grads: Mapping[str, Tensor] | Sequence[Tensor]) -> bool:
        """Advance S by one step and project all gradients in place.

        Args:
            grads: one gradient [n, d] per layer, keyed or ordered as the bases; any strides, and any floating
                dtype: it is projected in the bases' and written back in its own.

        Returns:
            False where a gradient was not finite: then nothing is projected, no S advances, and the caller
            should skip its optimizer step.  The layer is logged.

        Raises:
            ValueError: a missing or unknown layer, or a gradient whose shape does not fit its basis, or whose
                elements share memory, as those of an expanded tensor do: it cannot be written to.
            TypeError: a gradient that is not floating-point, or on another device than the bases.
        """
        named = dict(grads) if isinstance(grads, Mapping) else {str(i): grad for i, grad in enumerate(grads)}
        if set(named) != set(self.names):
            wrong = sorted(set(named) ^ set(self.names))
            raise ValueError(f"gradients of layers {wrong} are missing or unknown to this projector")
        for name, (width, _) in self.shapes.items():
            if named[name].dim() != 2 or named[name].shape[1] != width:
                raise ValueError(
                    f"layer {name!r}: gradient has shape {list(named[name].shape)}, expected [n, {width}]"
                )
            if _overlaps(named[name]):
                raise ValueError(
                    f"layer {name!r}: elements of the gradient {list(named[name].shape)} with strides "
                    f"{list(named[name].stride())} share memory, so it cannot be changed in place; clone it"
                )
        check_together(
            {"the projector": self.bases}
            | {f"layer {name!r}: gradient": grad for name, grad in named.items()}
        )
        if not self.names:
            return True
        layout = self.layout({name: len(grad) for name, grad in named.items()})
        ordered = [named[name] for block in layout.blocks for name in block.names]
        flat = torch.cat([grad.reshape(-1) for grad in ordered]).to(self.bases)
        if self.project_(flat, layout):
            self.report([name for name, part in layout.views(flat).items() if not part.isfinite().all()])
            return False
        parts = flat.split([grad.numel() for grad in ordered])
        torch._foreach_copy_(ordered, [part.view_as(grad) for part, grad in zip(parts, ordered, strict=True)])
        return True

    def report(self, layers: Iterable[str], step: int | None = None) -> None:
        """Count a skipped step, and log its number, where known, and the layers of non-finite gradients."""
        self.skipped_steps += 1
        which = "a step" if step is None else f"step {step}"
        logger.warning("skipped %s: the gate gradient is not finite in %s", which, ", ".join(layers))


def _wide_rows(basis: Tensor) -> Tensor:
    """Uᵀ [K, d] of U [d, K], flat and in single precision or better: norms + 1e-12 are 0 in fp16."""
    return basis.detach().mT.reshape(-1).to(wide(basis))


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share their place in memory, as those of an expanded tensor do."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False
