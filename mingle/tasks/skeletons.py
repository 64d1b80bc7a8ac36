"""A model without weights, on the meta device, from a configuration that anybody may have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from mingle.io.files import CheckpointError
from mingle.options import shown

_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers")
#: transformers fetches what else these can name, and runs it
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_PLAIN_ATTENTION = (None, "eager", "sdpa")
_MAX_LABELS = 100_000


def skeleton(
    classes: tuple[type[Any], type[Any]], config: Mapping[str, Any], path: Path, tensors: int
) -> nn.Module:
    """The model of a configuration, in no more time and memory than its checkpoint's tensors justify.

    Args:
        classes: in transformers, of the model and of its configuration.
        config: the content of ``config.json``.
        path: of that file, for messages.
        tensors: how many the checkpoint holds.

    Raises:
        CheckpointError: a configuration that is none of this class, that makes no model, that has more layers
            than the checkpoint has tensors, or that names another file or code to load.
    """
    for name, value in _settings(config):
        if name in _LAYERS and isinstance(value, int) and value > tensors:
            raise CheckpointError(f"{path}: {name}={shown(value)}, and the checkpoint has {tensors} tensors")
        if name == "num_labels" and isinstance(value, int) and value > _MAX_LABELS:
            raise CheckpointError(f"{path}: num_labels={shown(value)}: expected at most {_MAX_LABELS}")
        if name in _ATTENTION and value not in _PLAIN_ATTENTION:
            raise CheckpointError(f"{path}: {name}={shown(value)}: only 'eager' and 'sdpa' come without code")
        if name == "transformers_weights":
            raise CheckpointError(
                f"{path}: {name}={shown(value)}: weights are read from the usual files only"
            )
    model_class, config_class = classes
    try:
        with torch.device("meta"):
            model: nn.Module = model_class(config_class.from_dict(dict(config)))
    # What transformers and torch raise for values of a wrong type, sizes that do not fit and unknown names.
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError),
        *(StrictDataclassError, TypeError, ValueError),
    ) as error:
        reason = shown(str(error) or type(error).__name__)
        raise CheckpointError(f"{path}: no {model_class.__name__} can be made of it: {reason}") from error
    return model


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All names and values, also of the configurations of parts."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _settings(value)
