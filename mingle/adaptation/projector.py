"""The null-space constraint with adaptive relaxation (MINGLE Eqs. 8–11), for all layers at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.kernels.relaxed_projection import reference
from mingle.ops import dispatch

logger = logging.getLogger(__name__)

#: The most directions per layer that fit a program's registers in the Triton kernels.
MOST_DIRECTIONS = 1024


class Block(NamedTuple):
    """Layers with gradients [n, d] of one shape and one number of directions K, and where they lie.

    Attributes:
        names: the layers, L of them.
        rows, width, directions: n, d and K.
        gradient, basis, place: where the first layer's elements begin in the flat gradients, in the flat
            bases and in a flat tensor with one number per direction, such as S.
    """

    names: tuple[str, ...]
    rows: int
    width: int
    directions: int
    gradient: int
    basis: int
    place: int

    def gradients(self, flat: Tensor) -> Tensor:
        """Their gradients [L, n, d], a view."""
        return flat[self.gradient :][: len(self.names) * self.rows * self.width].view(
            len(self.names), self.rows, self.width
        )

    def bases(self, flat: Tensor) -> Tensor:
        """Uᵀ [L, K, d], a view."""
        return flat[self.basis :][: len(self.names) * self.directions * self.width].view(
            len(self.names), self.directions, self.width
        )

    def places(self, flat: Tensor) -> Tensor:
        """S, or anything else with one number per direction, [L, K], a view."""
        return flat[self.place :][: len(self.names) * self.directions].view(len(self.names), self.directions)


class RelaxedProjector(nn.Module):
    """Projects gate gradients away from earlier tasks' input directions, less where interference stays high.

    Per layer, for the gradient G [n, d] and the orthonormal basis U [d, K]:

        r_p = mean_n |G u_p| / (‖G_n‖ + 1e-12),  S ← β S + (1−β) r,  λ = exp(−γ S),  G ← G − (G U) diag(λ) Uᵀ

    S starts at 0 for every task: make a new projector for each.  All layers are projected together: by two
    launches on a GPU, elsewhere by a few products per shape.  Under data-parallel training project after the
    gradients' all-reduce, and once per optimizer step when gradients are accumulated.

    Args:
        bases: orthonormal columns [d, K] per layer, as a mapping by layer name or a sequence; K = 0 leaves a
            layer unconstrained.
        gamma: γ; 0 is the hard projector (λ = 1).
        beta: β, the memory of S.
        backend: ``"eager"`` takes layer after layer by the formula, ``"grouped"`` the layers of one shape
            together, ``"triton"`` all at once; ``"auto"`` the fastest that can run.

    Raises:
        ValueError: β outside [0, 1), a negative γ, an unknown backend, or a basis that is not a matrix.
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
        if gamma < 0:
            raise ValueError(f"gamma={gamma}: expected a value >= 0")
        if backend not in dispatch.BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {', '.join(dispatch.BACKENDS)}")
        self.gamma, self.beta, self.backend = gamma, beta, backend
        named = (
            dict(bases) if isinstance(bases, Mapping) else {str(i): basis for i, basis in enumerate(bases)}
        )
        for name, basis in named.items():
            if basis.dim() != 2:
                raise ValueError(f"layer {name!r}: basis has shape {list(basis.shape)}, expected [d, K]")
        self.names = tuple(named)
        self.skipped_steps = 0
        # Layers of one shape lie side by side, so that one product serves them all.
        order = sorted(named, key=lambda name: named[name].shape)
        self.shapes = {name: (named[name].shape[0], named[name].shape[1]) for name in order}
        empty = torch.empty(0)
        self.register_buffer(
            "bases", torch.cat([named[name].detach().mT.reshape(-1) for name in order]) if order else empty
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
            gradients: all gradients in one flat tensor, in the bases' dtype.
            layout: where each layer's gradient lies, from this projector's `layout`.

        Returns:
            bool []: whether some gradient is not finite.  Then nothing has changed, and the caller should
            skip its optimizer step.

        Raises:
            RuntimeError: ``backend="triton"`` cannot run here; the message says why.
        """
        if layout.directions and self._fused(gradients, layout):
            # slow to import, and not available everywhere
            from mingle.kernels.relaxed_projection import triton as relaxed_projection

            options = (self.gamma, self.beta, layout.rows, layout.directions)
            return relaxed_projection.project_(
                gradients, layout.table(gradients.device), self.bases, self.interferences, *options
            ).any()
        broken = ~gradients.isfinite().all()
        for block in layout.blocks:
            parts = block.gradients(gradients), block.bases(self.bases), block.places(self.interferences)
            if block.directions == 0 or (broken.device.type == "cpu" and broken):
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
            grads: one gradient [n, d] per layer, keyed or ordered as the bases.

        Returns:
            False where a gradient was not finite: then nothing is projected, no S advances, and the caller
            should skip its optimizer step.  The layer is logged.

        Raises:
            ValueError: a missing or unknown layer, or a gradient whose shape does not fit its basis.
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
        if not self.names:
            return True
        layout = self.layout({name: len(grad) for name, grad in named.items()})
        ordered = [named[name] for block in layout.blocks for name in block.names]
        flat = torch.cat([grad.reshape(-1) for grad in ordered]).to(self.bases)
        if self.project_(flat, layout):
            self.report([name for name, grad in named.items() if not grad.isfinite().all()])
            return False
        parts = flat.split([grad.numel() for grad in ordered])
        torch._foreach_copy_(ordered, [part.view_as(grad) for part, grad in zip(parts, ordered, strict=True)])
        return True

    def report(self, layers: Iterable[str], step: int | None = None) -> None:
        """Count a skipped step, and log its number, where known, and the layers of non-finite gradients."""
        self.skipped_steps += 1
        which = "a step" if step is None else f"step {step}"
        logger.warning("skipped %s: the gate gradient is not finite in %s", which, ", ".join(layers))


class Layout:
    """Where the gradient, the basis and S of every layer lie in flat tensors.

    Attributes:
        blocks: the layers, those of equal shapes together.
        rows, directions: the largest n and K.
        size: the number of elements of the flat gradients and of the loose numbers behind them.
    """

    def __init__(self, blocks: list[Block], loose: int) -> None:
        self.blocks = blocks
        self.rows = max((block.rows for block in blocks), default=0)
        self.directions = max((block.directions for block in blocks), default=0)
        self._loose = sum(len(block.names) * block.rows * block.width for block in blocks)
        self.size = self._loose + loose
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]], rows: Sequence[int], loose: int = 0) -> Layout:
        """The layout of layers in order, each with (d, K) of its basis and its number of rows."""
        blocks: list[Block] = []
        gradient = basis = place = 0
        for (name, (width, directions)), n in zip(shapes.items(), rows, strict=True):
            last = blocks[-1] if blocks else None
            if last is not None and (last.rows, last.width, last.directions) == (n, width, directions):
                blocks[-1] = last._replace(names=(*last.names, name))
            else:
                blocks.append(Block((name,), n, width, directions, gradient, basis, place))
            gradient, basis, place = gradient + n * width, basis + directions * width, place + directions
        return cls(blocks, loose)

    def loose(self, gradients: Tensor) -> Tensor:
        """The loose numbers, a view."""
        return gradients[self._loose :]

    def views(self, gradients: Tensor) -> dict[str, Tensor]:
        """Every layer's gradient [n, d] in the flat tensor."""
        return {
            name: part
            for block in self.blocks
            for name, part in zip(block.names, block.gradients(gradients), strict=True)
        }

    def table(self, device: torch.device) -> Tensor:
        """One row per layer for `mingle.kernels.relaxed_projection.triton`, int64 [L, 6]."""
        if device not in self._tables:
            entries = [
                (
                    block.gradient + i * block.rows * block.width,
                    block.rows,
                    block.width,
                    block.directions,
                    block.basis + i * block.directions * block.width,
                    block.place + i * block.directions,
                )
                for block in self.blocks
                for i in range(len(block.names))
            ]
            # the loose numbers are the gradient of a layer without directions
            entries += [(self._loose, 1, self.size - self._loose, 0, 0, 0)] * (self.size > self._loose)
            self._tables[device] = torch.tensor(entries, dtype=torch.int64, device=device)
        return self._tables[device]
