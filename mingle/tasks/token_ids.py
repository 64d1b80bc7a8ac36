"""Whether a model can read the tokens of samples."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from mingle.tasks.data import TaskData
from mingle.tasks.lazy import LazyInputs

#: modules with a vector for every place in a text
_PLACES = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")


def check_token_ids(model: nn.Module, data: TaskData) -> None:
    """Raise `ValueError` for tokens, places or masks of samples that the model has no use for.

    Args:
        model: that is to read them.
        data: samples; only those of texts are looked at.
    """
    ids = None if isinstance(data.inputs, LazyInputs) else data.inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or not ids.numel():
        return
    known = token_embeddings(model)
    if known is not None:
        strange = (ids < 0) | (ids >= known.num_embeddings)
        if strange.any():
            row, place = _first(strange)
            found, last = int(ids[row, place]), known.num_embeddings - 1
            raise ValueError(f"input_ids: token {found} in row {row}; the model knows tokens 0 to {last}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _PLACES.search(name):
            places = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
            if ids.shape[1] > places:
                raise ValueError(f"input_ids: rows of {ids.shape[1]} tokens; the model has {places} places")
    mask = data.inputs.get("attention_mask")
    if mask is not None and mask.shape == ids.shape:
        strange = (mask != 0) & (mask != 1)
        if strange.any():
            row, place = _first(strange)
            raise ValueError(f"attention_mask: {mask[row, place].item()} in row {row}; expected 0 or 1")
        if (empty := ~mask.bool().any(1)).any():
            raise ValueError(f"attention_mask: row {_first(empty)[0]} has no token that counts")


def token_embeddings(model: nn.Module) -> nn.Embedding | None:
    """The model's embeddings of tokens, where it has such."""
    whole: Any = model
    try:
        found = whole.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not of transformers, or without any
        return None
    return found if isinstance(found, nn.Embedding) else None


def _first(marked: Tensor) -> list[int]:
    """Where the first marked entry is."""
    return [int(place) for place in torch.nonzero(marked)[0]]
