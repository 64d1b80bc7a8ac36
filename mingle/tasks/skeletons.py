"""A model without weights, on the meta device, from a configuration that anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle.io.files import CheckpointError
from mingle.options import shown
from mingle.tasks.configs import broken, parsed, with_parts

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


def skeleton(
    model_class: type[Any], config_class: type[Any], config: Mapping[str, Any], path: Path, tensors: int
) -> nn.Module:
    """The model of a configuration, in no more time and memory than its checkpoint justifies.

    Args:
        model_class, config_class: in transformers.
        config: the content of ``config.json``.
        path: of that file, for messages.
        tensors: how many the checkpoint holds.

    Raises:
        CheckpointError: a configuration that makes no model of this class, or one with more layers than the
            checkpoint has tensors.
    """
    for name, value in with_parts(config):
        if name in _LAYERS and isinstance(value, int) and value > tensors:
            raise CheckpointError(f"{path}: {name}={shown(value)}, and the checkpoint has {tensors} tensors")
    settings = parsed(config_class, config, path)
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(settings)
    except broken() as error:
        reason = shown(str(error) or type(error).__name__)
        raise CheckpointError(f"{path}: no {model_class.__name__} can be made of it: {reason}") from error
    return model
