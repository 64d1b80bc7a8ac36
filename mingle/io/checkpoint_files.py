"""Which files of a folder are its checkpoint: one file, shards with their index, or an adapter."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mingle.io.adapter_config import CONFIG as ADAPTER_CONFIG
from mingle.io.files import CheckpointError, contained, naming, read_json, similar
from mingle.options import shown

_MODEL, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_NAMES = (_MODEL, _INDEX, _ADAPTER)
_SHOWN = 5
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


def find_checkpoint(path: Path) -> Path:
    """The safetensors file or index that `path`, a file or a folder, stands for.

    Raises:
        CheckpointError: none there, the files of two models, or pickles, with the command that converts them.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder{similar(Path(path))}")
    refuse_two_models(path)
    for name in _NAMES:
        if os.path.isfile(file := contained(path, name)):
            return file
    with naming(path):
        pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES and file.is_file())
    if not pickles:
        inside = sorted(str(config.parent) for config in path.glob(f"*/{ADAPTER_CONFIG}"))
        found = f"; there are adapters in {', '.join(inside[:_SHOWN])}" if inside else ""
        raise CheckpointError(f"{path}: no checkpoint; looked for {', '.join(_NAMES)}{found}")
    models = [file for file in pickles if file.name.startswith("pytorch_model")]
    adapters = [file for file in pickles if file.name.startswith("adapter_model")]
    # With no conventional name, the weights are by far the largest file: the rest is optimizer state or
    # training arguments.
    weights = models or adapters or [max(pickles, key=os.path.getsize)]
    raise pickle_error(path, weights, path / (_NAMES[2] if weights == adapters else _NAMES[0]))


def refuse_two_models(folder: Path) -> None:
    """Raise `CheckpointError` for a folder with the files of two models, such as a model and an adapter.

    Programs differ in which of them they read.
    """
    adapters = [name for name in (_ADAPTER, ADAPTER_CONFIG) if (folder / name).exists()]
    models = [name for name in (_MODEL, _INDEX) if (folder / name).exists()]
    if len(models) == 2 and set(read_index(contained(folder, _INDEX)).values()) == {folder / _MODEL}:
        models = [_MODEL]
    if len(models) + bool(adapters) > 1:
        one, other, *_ = models + adapters
        reason = "which of them is meant cannot be told; move one to a folder of its own"
        raise CheckpointError(f"{folder}: holds two models, {one} and {other}: {reason}")


def pickle_error(path: Path, weights: list[Path], target: Path) -> CheckpointError:
    """Why the pickled `weights` at `path` are refused, and the command that makes `target` of them."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        "parts = [torch.load(file, map_location='cpu', weights_only=True) "
        f"for file in {[str(file) for file in weights]}]; "
        "tensors = {name: value.contiguous().clone() for part in parts for name, value in part.items()}; "
        f"save_file(tensors, {str(target)!r}, metadata={{'format': 'pt'}})"
    )
    return CheckpointError(
        f"{path}: pickle checkpoints are refused, because loading one runs code. "
        f"If you trust its source, convert it in a trusted environment:\n{shlex.join(['python', '-c', code])}"
    )


def read_index(index: Path) -> dict[str, Path]:
    """The shard of each tensor; every shard is inside the index's folder and exists.

    Raises:
        CheckpointError: a broken index, or a shard that is missing or outside.
    """
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' must map tensor names to shard names")
    shards = {shard: contained(index.parent, shard) for shard in sorted(set(weight_map.values()))}
    for shard, path in shards.items():
        if not os.path.isfile(path):
            raise CheckpointError(f"{index}: shard {shown(shard)} is missing")
    return {name: shards[shard] for name, shard in weight_map.items()}
