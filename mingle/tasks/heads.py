"""Heads of tasks, put into a model and taken out again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn


def head_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a head by their names in the model, as they are."""
    state = model.state_dict()
    return {name: state[name] for name in names}


def put_head(model: nn.Module, head: Mapping[str, Tensor]) -> None:
    """Put a head into a model, on the model's device and in its dtype; it may have any number of classes.

    Args:
        model: changed in place.
        head: tensors by the names that they have in the model.
    """
    for name, tensor in head.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        value = tensor.to(getattr(module, key), copy=True)
        if key in module._parameters:
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(key, value, key not in module._non_persistent_buffers_set)
        if isinstance(module, nn.Linear) and key == "weight":
            module.out_features, module.in_features = value.shape
