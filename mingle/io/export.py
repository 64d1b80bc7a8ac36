"""A merged model as a plain Hugging Face folder, without anything of mingle in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle.io.base_files import DATA_SUFFIXES, base_files
from mingle.io.files import (
    CheckpointError,
    contained,
    naming,
    read_json,
    write_copy,
    write_json,
    write_text,
)
from mingle.io.lazy_tensors import chosen, consecutive, described
from mingle.io.safetensors import write_tensors
from mingle.io.staging import staged
from mingle.io.state_dicts import first_names

#: Larger models are written in several files.
SHARD_BYTES = 5_000_000_000

Tensors = dict[str, torch.Tensor]


def whole_model(base: nn.Module, tower: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The base's state with the tower's tensors replaced.

    Tensors that the model ties together appear once, under their first name.

    Args:
        base: the whole base model.
        tower: the tower's dotted name in it; empty where the tower is the whole model.
        tensors: the new tensors under the tower's own names.
    """
    prefix, state = f"{tower}." if tower else "", base.state_dict()
    return {
        name: tensors[name.removeprefix(prefix)] if name.startswith(prefix) else state[name]
        for name in dict.fromkeys(first_names(base).values())
    }


def hub_config(base: nn.Module, source: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """The base's configuration with the dtype of the weights, in which `from_pretrained` then loads them.

    Raises:
        CheckpointError: the base has no configuration.
    """
    own: Any = getattr(base, "config", None)
    if source is not None:
        config = read_json(source / "config.json")
    elif own is not None:
        config = own.to_dict() | {"architectures": [type(base).__name__]}
    else:
        raise CheckpointError(
            f"the base {type(base).__name__} has no config, without which a hub folder cannot be loaded"
        )
    config.pop("torch_dtype", None)
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def with_head(config: Mapping[str, Any], architecture: str, names: Sequence[str]) -> dict[str, Any]:
    """The configuration of a classifier with another head than the base has, or with the first one.

    Args:
        config: the base's.
        architecture: the name of the class with a head.
        names: of the head's classes.
    """
    own = {
        "architectures": [architecture],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return {key: value for key, value in config.items() if key != "num_labels"} | own


def write_model(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    files: Mapping[str, Any],
    source: Path | None,
    card: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a hub folder: weights, configuration, model card, and the base's tokenizer or processor.

    Whole or not at all, see `mingle.io.staging.staged`.

    Args:
        folder: a new or an empty folder.
        state: tensors by the names that they get; lazy ones are in memory one at a time.
        files: contents of JSON files by their names, ``config.json`` at least.
        source: the base's folder, which has the other files; None where there is none.
        card: the text of the model card.
        shard_bytes: how large a file of weights may be.

    Raises:
        CheckpointError: the folder is in use, another process is writing it, or the disk is full.
    """
    with staged(folder, sum(described(state, name).nbytes for name in state)) as staging:
        if source is not None:
            _copy_data(source, staging)
        for name, content in files.items():
            with naming(staging):
                (staging / name).parent.mkdir(exist_ok=True)
            write_json(staging / name, content)
        write_text(staging / "README.md", card)
        _write_weights(staging, state, shard_bytes)


def _copy_data(source: Path, target: Path) -> None:
    """Copy what a folder holds beside weights and the configuration."""
    for file in base_files(source, DATA_SUFFIXES):
        name = file.relative_to(source).as_posix()
        if name != "config.json" and ".safetensors" not in name:
            with naming(target):
                (target / name).parent.mkdir(exist_ok=True)
            write_copy(contained(source, name), target / name)


def _write_weights(folder: Path, state: Mapping[str, torch.Tensor], shard_bytes: int) -> None:
    """One safetensors file, or several and their index, under the hub's names."""
    sizes = {name: described(state, name).nbytes for name in state}
    shards = consecutive(sizes, shard_bytes)
    if len(shards) <= 1:
        write_tensors(folder / "model.safetensors", state)
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, chosen(state, shard))
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
    )
