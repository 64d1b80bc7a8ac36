"""Heads of tasks, put into a model and taken out again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Head(NamedTuple):
    """What a task answers with, beside the model that is merged.

    Attributes:
        tensors: of a classifier, by the names that they have in the model.
        shared: what all the task's samples share, such as the embeddings of its classes; see
            `mingle.tasks.TaskData`.
        labels: the names of its classes by number, None where they are not known.
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    labels: Sequence[str] | None = None


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


def class_count(tensors: Mapping[str, Tensor]) -> int | None:
    """How many classes a classifier's head tells apart, the rows of its last matrix; None without any."""
    rows = [len(tensor) for tensor in tensors.values() if tensor.dim() == 2]
    return rows[-1] if rows else None


def names_of(head: Head) -> list[str]:
    """The names of a classifier's classes; those that transformers gives where they are not known."""
    if head.labels is not None:
        return list(head.labels)
    return [f"LABEL_{number}" for number in range(class_count(head.tensors) or 0)]


def put_names(model: nn.Module, names: Sequence[str]) -> None:
    """Note the names of classes in the configuration of a model of transformers, changed in place."""
    whole: Any = model
    whole.num_labels = len(names)
    whole.config.id2label = dict(enumerate(names))
    whole.config.label2id = {name: number for number, name in enumerate(names)}


def common_part(model: nn.Module, tower: str, heads: Collection[str]) -> str | None:
    """The part of a model that computes the same whichever head is in it.

    Args:
        model: the model.
        tower: the dotted name of what is merged.
        heads: the names of the tensors that each task has of its own.

    Returns:
        The tower; where heads have tensors inside of it, that child of it with the blocks; None for none.
    """
    inside = f"{tower}." if tower else ""
    if not any(name.startswith(inside) for name in heads):
        return tower
    for child, module in model.get_submodule(tower).named_children():
        own = any(name.startswith(f"{inside}{child}.") for name in heads)
        if not own and any(isinstance(part, nn.ModuleList) for part in module.modules()):
            return f"{inside}{child}"
    return None
