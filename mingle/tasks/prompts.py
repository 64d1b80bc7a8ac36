"""Prompts and answers of unequal lengths: where they end, their padding, and the positions of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [n, S] and what is not padding [n, S], int64, with the padding first, wherever it was."""
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.long().gather(1, order)


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the padding last."""
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def positions(mask: Tensor) -> Tensor:
    """The position of every token in its sample, [n, S], which padding on the left does not move.

    Args:
        mask: [n, S], not 0 for tokens that count.
    """
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def endings(model: nn.Module) -> tuple[list[int], int]:
    """The tokens that end an answer of a model of transformers, and the one that fills up what follows it.

    By its settings of generation, or else by its configuration; each may lack either of them.
    """
    end, pad = (_setting(model, name) for name in ("eos_token_id", "pad_token_id"))
    ends = [end] if isinstance(end, int) else list(end or [])
    return ends, pad if isinstance(pad, int) else ends[0] if ends else 0


def start(model: nn.Module) -> int:
    """The token that a decoder's answers begin with in `generate`, by the same settings.

    Raises:
        ValueError: none is set.
    """
    for name in ("decoder_start_token_id", "bos_token_id"):
        if isinstance(token := _setting(model, name), int):
            return token
    raise ValueError(f"{type(model).__name__}: its configuration has no decoder_start_token_id")


def _setting(model: nn.Module, name: str) -> Any:
    """A setting of generation; where there is none, that of the configuration or of its decoder's part."""
    whole: Any = model
    parts = (getattr(whole, "generation_config", None), whole.config, getattr(whole.config, "decoder", None))
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), None)
