"""What fine-tuning changed in the layers of a model that stays in its files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mingle.io.lazy_tensors import LazyTensors, Rows, described
from mingle.io.state_dicts import task_vector
from mingle.nn.linear import MingleLinear
from mingle.nn.matrices import oriented


class LayerDeltas(LazyTensors):
    """Δ [d_out, d_in] of layers, of two models of which each tensor is read when it is asked for.

    Args:
        layers: by name.
        start: what the fine-tuned model is compared with, by names of weights.
        tuned: the fine-tuned model.
    """

    def __init__(
        self, layers: Mapping[str, MingleLinear], start: Mapping[str, torch.Tensor], tuned: LazyTensors
    ) -> None:
        super().__init__(layers)
        self._layers, self._start, self._tuned = layers, start, tuned

    def described(self, name: str) -> torch.Tensor:
        weight = described(self._tuned, f"{name}.weight")
        return oriented(torch.empty_like(weight, device="meta"), self._layers[name])

    def rows(self, name: str, rows: Rows) -> torch.Tensor:
        layer, key = self._layers[name], f"{name}.weight"
        return oriented(task_vector(self._start, self._tuned, [key])[key], layer)[rows]

    def in_rows(self, name: str) -> bool:
        return False
