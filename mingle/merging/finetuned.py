"""A fine-tuned model, in whatever form it comes, as the tensors of its tower under the base's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mingle.io.adapter_config import CONFIG
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import IncompatibleModel, align
from mingle.nn.linear import LowRankExpert
from mingle.nn.peft import read_adapter
from mingle.options import nearest

#: a module, a state dict, or a local folder: a checkpoint of the whole model or of its tower, or a PEFT LoRA
#: adapter
Model = nn.Module | Mapping[str, Tensor] | str | Path


def tower_tensors(
    model: Model, base: Mapping[str, Tensor], first: Mapping[str, str], prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """The fine-tuned tower; for a LoRA adapter, the base with W₀ + B A in the layers that it names.

    Args:
        model: the fine-tuned model.
        base: the base tower.
        first: the base tower's `mingle.io.state_dicts.first_names`.
        prefixes: what a checkpoint may put before the tower's names.

    Raises:
        IncompatibleModel: not a fine-tuned version of the base.
        CheckpointError: a broken checkpoint, or one with NaN or infinite weights.
    """
    if isinstance(model, nn.Module):
        return align(base, model.state_dict(), prefixes, first)
    if isinstance(model, Mapping):
        return align(base, model, prefixes, first)
    if is_adapter(model):
        experts = _named(model, base, prefixes)
        updated = {
            name: base[name] + (expert.B @ expert.A).to(base[name]) for name, expert in experts.items()
        }
        return dict(base) | updated
    reader = CheckpointReader(model)
    return align(base, {name: reader.tensor(name) for name in _own(reader, prefixes)}, prefixes, first)


def check_tower(
    folder: str | Path, base: Mapping[str, Tensor], first: Mapping[str, str], prefixes: tuple[str, ...]
) -> None:
    """Raise what `tower_tensors` would raise for names and shapes, for a base on any device.

    Only a checkpoint's header is read.
    """
    if is_adapter(folder):
        _named(folder, base, prefixes)
        return
    reader = CheckpointReader(folder)
    align(
        base,
        {name: torch.empty(reader.shape(name), device="meta") for name in _own(reader, prefixes)},
        prefixes,
        first,
    )


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (Path(folder) / CONFIG).exists()


def _own(reader: CheckpointReader, prefixes: tuple[str, ...]) -> Iterable[str]:
    """The names of the tower's tensors in a whole model's checkpoint, or all names of a tower's."""
    return [name for name in reader if name.startswith(prefixes)] or list(reader)


def _named(
    folder: str | Path, base: Mapping[str, Tensor], prefixes: tuple[str, ...]
) -> dict[str, LowRankExpert]:
    """The adapter's experts, by the base's names of the weights that they change."""
    named: dict[str, LowRankExpert] = {}
    for layer, expert in read_adapter(folder).items():
        name = (
            next((layer.removeprefix(prefix) for prefix in prefixes if layer.startswith(prefix)), layer)
            + ".weight"
        )
        if name not in base:
            raise IncompatibleModel(
                f"{folder}: the adapter's layer {layer!r} is not in the base{nearest(name, base)}"
            )
        shape = (expert.B.shape[0], expert.A.shape[1])
        if tuple(base[name].shape) != shape:
            shapes = f"{list(shape)}, in the base {list(base[name].shape)}"
            raise IncompatibleModel(f"{folder}: the adapter's layer {layer!r} is {shapes}")
        named[name] = expert
    return named
