"""Where the gradients, the bases and S of all layers lie in flat tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
