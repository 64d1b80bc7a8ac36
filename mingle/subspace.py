"""The input directions a task uses, per layer: what later gates must not disturb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mingle import linalg


@contextmanager
def input_covariances(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """While the block runs, accumulate Σ xᵀx over every token each layer sees.

    Yields:
        name → uncentred covariance [d_in, d_in] in float64, filled as the model runs.  Layers that are given the very same tensor, as
        q, k and v are, share one product.
    """
    sums: dict[str, torch.Tensor] = {}
    last: tuple[Any, torch.Tensor] | None = None

    def hook(name: str) -> Any:
        def accumulate(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal last
            x = args[0]
            if last is None or last[0] is not x:
                tokens = x.detach().flatten(0, -2).double()
                last = (x, tokens.mT @ tokens)
            sums[name] = sums[name] + last[1] if name in sums else last[1]

        return accumulate

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def extend(bases: Mapping[str, torch.Tensor], covariances: Mapping[str, torch.Tensor], k: int) -> dict[str, torch.Tensor]:
    """Every layer's basis with the top-`k` input directions of one more task: [d_in, K] → [d_in, K' ≤ K + k]."""
    return {
        name: linalg.extend_basis(bases[name], linalg.top_subspace(covariance, k).to(bases[name].dtype))
        for name, covariance in covariances.items()
    }


def saturated(bases: Mapping[str, torch.Tensor]) -> Iterable[str]:
    """The layers whose basis fills the whole input space: no later gate can move there under a hard constraint."""
    return [name for name, basis in bases.items() if basis.shape[1] >= len(basis)]
