"""A model without weights, on the meta device, from a configuration that anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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


def completed(model: nn.Module, folder: Path) -> nn.Module:
    """A skeleton with what a loaded model has beside its parameters; changed in place.

    Buffers are those of another model of its configuration, whose parameters are dropped as soon as they are
    made.  How it generates is in a file of its own.

    Args:
        model: of transformers.
        folder: that it is of.
    """
    from transformers import GenerationConfig

    whole: Any = model

    def dropped(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(dropped)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=()):
            twin: nn.Module = type(whole)(whole.config)
    finally:
        hook.remove()
    found = dict(twin.named_buffers())
    for path, module in model.named_modules():
        for key in module._buffers:
            if (value := found.get(f"{path}.{key}".removeprefix("."))) is not None:
                module._buffers[key] = value
    if hasattr(model, "generation_config") and (folder / "generation_config.json").is_file():
        whole.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
