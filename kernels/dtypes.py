"""The dtype in which small numbers and long sums are kept."""

from __future__ import annotations

import torch


def wide(x: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32: what sums, means, gates and differences of x's dtype are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
