"""Where merges run that a command makes."""

from __future__ import annotations

import torch


def usual() -> torch.device:
    """The GPU in use, which is its own for each of several processes, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
