"""What PEFT's LoRA adapters make of a model, from the folders that `save_pretrained` writes.

Beside low-rank updates of linear layers these may hold updates of embeddings, lengths of rows (DoRA), and
whole tensors: of `modules_to_save`, trained biases, and embeddings that PEFT saves along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mingle.io.adapter_config import OR_WHOLE, WEIGHTS, AdapterConfig
from mingle.io.checkpoint_files import refuse_two_models
from mingle.io.files import CheckpointError, contained
from mingle.io.lazy_tensors import LazyTensors, Rows
from mingle.io.safetensors import CheckpointReader
from mingle.kernels.dtypes import wide
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.options import shown

#: what stands before the model's own names in an adapter's file
ROOT = "base_model.model."
_PICKLE = "adapter_model.bin"
#: parts of a layer's update by their names in the file
_PART = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.(?:"
    r"(?P<linear>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight|"
    r"(?P<embedding>lora_embedding_[AB])|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE = "lora_magnitude_vector"
#: options of adapters that hold more than low-rank updates of linear layers, and can be read
_MORE = frozenset({"use_dora", "modules_to_save", "bias"})
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_NAME = 1000
#: where the file of an adapter with trained biases has those of whole modules once more
_COPY = re.compile(r"\.(?:modules_to_save|original_module)\.")


class Change(NamedTuple):
    """What an adapter makes of a layer's weight W [d_out, d_in].

    Attributes:
        expert: A [r, d_in] and B [d_out, r]: the weight becomes W + B A.
        magnitude: m [d_out] where rows of the sum get these lengths (DoRA, Liu et al., 2024), or None.
        embedding: whether the layer is an embedding, whose weight is Wᵀ.
    """

    expert: LowRankExpert
    magnitude: Tensor | None = None
    embedding: bool = False

    def apply_(self, weight: Tensor) -> None:
        """Change W [d_out, d_in] in place; a row without a direction becomes NaN."""
        weight += self.expert.delta().to(weight)
        if self.magnitude is not None:
            weight *= (self.magnitude.to(weight) / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)


class SavedTensors(LazyTensors):
    """Whole tensors of an adapter's file by their names in the model, each read when it is asked for.

    Args:
        reader: of the file.
        names: name in the model → name in the file.
    """

    def __init__(self, reader: CheckpointReader, names: Mapping[str, str]) -> None:
        super().__init__(names)
        self._reader, self._own = reader, names

    def described(self, name: str) -> Tensor:
        return self._reader.described(self._own[name])

    def rows(self, name: str, rows: Rows) -> Tensor:
        return self._reader.tensor(self._own[name], rows)


class Adapter(NamedTuple):
    """What an adapter's folder holds.

    Attributes:
        changes: by the name of the layer in the model.
        saved: whole tensors, by their names in the model.
    """

    changes: dict[str, Change]
    saved: SavedTensors

    def experts(self) -> dict[str, LowRankExpert]:
        """A [r, d_in] and B [d_out, r] by layer."""
        return {layer: change.expert for layer, change in self.changes.items()}


def read(folder: Path, *, only: Collection[str] | None = None) -> Adapter:
    """What an adapter holds; of whole tensors only the headers are read here.

    Args:
        folder: of the adapter.
        only: the names of the whole tensors that there may be beside low-rank updates of linear layers; with
            None there may be all that this module knows.

    Raises:
        CheckpointError: see `mingle.read_adapter`.
    """
    refuse_two_models(folder)
    known = _MORE if only is None else {"modules_to_save"} if only else set[str]()
    config = AdapterConfig.read(folder, known)
    path = contained(folder, WEIGHTS)
    if not path.is_file():
        path = contained(folder, _PICKLE)  # whose reader explains how to convert it
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {WEIGHTS}")
    reader = CheckpointReader(path)
    parts, saved = _sorted(reader, path, only)
    scalings = {layer: _check_parts(reader, path, layer, names, config) for layer, names in parts.items()}
    changes = {layer: _change(reader, path, names, scalings[layer]) for layer, names in parts.items()}
    return Adapter(changes, SavedTensors(reader, saved))


def factor_names(layer: str) -> tuple[str, str]:
    """PEFT's names of A and B of a linear layer, in the file of an adapter."""
    first, second = (f"{ROOT}{layer}.{half}.weight" for half in _LINEAR)
    return first, second


def _sorted(
    tensors: Collection[str], path: Path, only: Collection[str] | None
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The parts of each layer's update by name, and whole tensors by their names in the model.

    Both lead to the names in the file.
    """
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    adapters = set[str | None]()
    for name in tensors:
        if (plain := _COPY.sub(".", name)) != name and plain in tensors:
            continue
        whole = name.removeprefix(ROOT).replace(".base_layer.", ".")  # of a layer that has an update too
        match = _PART.fullmatch(name) if len(name) <= _MAX_NAME else None
        if match and (only is None or match["linear"]):
            part = match["linear"] or match["embedding"] or match["magnitude"]
            adapters |= {match["adapter"]} if match["linear"] else set()
            parts.setdefault(match["layer"], {})[part] = name
        elif _is_whole(name) if only is None else whole in only and name.startswith(ROOT):
            if saved.setdefault(whole, name) != name:
                raise CheckpointError(f"{path}: tensors {saved[whole]!r} and {name!r} are both {whole!r}")
        else:
            expected = " and ".join(factor_names("<layer>"))
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is not a factor of a linear layer; expected {expected}; "
                f"{OR_WHOLE}"
            )
        if len(adapters) > 1:
            raise CheckpointError(f"{path}: tensor {name!r}: more than one adapter in one file")
    if not parts:
        raise CheckpointError(f"{path}: no tensors of an update" if saved else f"{path}: no tensors")
    return parts, saved


def _is_whole(name: str) -> bool:
    """Whether a tensor can be one of the model itself, by its name."""
    return name.startswith(ROOT) and ".lora_" not in name and len(name) <= _MAX_NAME


def _halves(names: Collection[str]) -> tuple[str, str]:
    """The names of A and B, given the names of a layer's parts."""
    return _LINEAR if any(half in names for half in _LINEAR) else _EMBEDDING


def _check_parts(
    reader: CheckpointReader, path: Path, layer: str, names: Mapping[str, str], config: AdapterConfig
) -> float:
    """The scaling of a layer whose parts, by their headers, are as configured."""
    halves = _halves(names)
    magnitude = {_MAGNITUDE} if config.dora else set[str]()
    for part in (*halves, *magnitude):
        if part not in names:
            raise CheckpointError(f"{path}: layer {layer!r} has {min(names.values())!r} and no {part}")
    if strange := sorted(names.keys() - {*halves, *magnitude}):
        raise CheckpointError(f"{path}: tensor {names[strange[0]]!r} has no place by {config.path}")
    for name in names.values():
        if reader.dtype(name) not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is of {reader.dtype(name)}; expected {', '.join(map(str, _DTYPES))}"
            )
    a, b = (names[half] for half in halves)
    rank, A, B = config.rank(layer), reader.shape(a), reader.shape(b)
    if len(A) > 2:
        raise CheckpointError(f"{path}: tensor {a!r} is {list(A)}, of a convolution; {OR_WHOLE}")
    if len(A) != 2 or len(B) != 2 or A[0] != rank or B[1] != rank:
        raise CheckpointError(
            f"{path}: tensors {a!r} {list(A)} and {b!r} {list(B)}: "
            f"expected [{rank}, d_in] and [d_out, {rank}] by the rank in {config.path}"
        )
    if config.dora and (found := reader.shape(names[_MAGNITUDE])) != (B[0],):
        raise CheckpointError(f"{path}: tensor {names[_MAGNITUDE]!r} is {list(found)}, expected {[B[0]]}")
    return config.scaling(layer)


def _change(reader: CheckpointReader, path: Path, names: Mapping[str, str], scaling: float) -> Change:
    """What the parts of a layer make of it."""
    halves = _halves(names)
    A, B = (factor.to(wide(factor)) for factor in (reader.tensor(names[half]) for half in halves))
    B = B * scaling
    if not B.isfinite().all():
        raise CheckpointError(
            f"{path}: tensor {names[halves[1]]!r} times its scaling {scaling:g} is not finite"
        )
    magnitude = reader.tensor(names[_MAGNITUDE]) if _MAGNITUDE in names else None
    return Change(LowRankExpert(A, B), magnitude, halves == _EMBEDDING)
