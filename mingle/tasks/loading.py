"""Models from local folders in hub format, checked before transformers opens them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mingle.io.files import CheckpointError
from mingle.io.lazy_tensors import LazyTensors, Rows
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import DEQUANTISE, first_names, same_values
from mingle.tasks.configs import CONFIG, read_config
from mingle.tasks.names import ModelTensors
from mingle.tasks.skeletons import skeleton


class ModelCheckpoint(ModelTensors, LazyTensors):
    """The tensors of a folder in hub format under the names that they have in the model, read when asked for.

    Args:
        folder: the folder; nothing outside of it is opened.
        model: a model of the checkpoint's class, or with the same tower; it may be on the meta device.
        strip: see `mingle.tasks.names.ModelTensors`.
        reader: of the folder, where there is one already.

    Raises:
        CheckpointError: the folder does not hold an intact safetensors checkpoint.
    """

    def __init__(
        self, folder: Path, model: nn.Module, *, strip: bool = True, reader: CheckpointReader | None = None
    ) -> None:
        self._reader = reader or CheckpointReader(folder)
        super().__init__(model, self._reader, self._reader.tensor, strip=strip, where=str(folder))

    def described(self, name: str) -> Tensor:
        """The tensor on the meta device, by the files' headers alone."""
        return self._made(name, self._reader.described)

    def files(self) -> set[str]:
        """The names that the tensors have in the files."""
        return set(self._reader)

    def rows(self, name: str, rows: Rows) -> Tensor:
        if rows is ...:
            return self[name]
        file = self.file_of(name)
        return self[name][rows].clone() if file is None else self._reader.tensor(file, rows)

    def in_rows(self, name: str) -> bool:
        return self.file_of(name) is not None


#: the content of a ``config.json`` → the class in transformers
FindClass = Callable[[Mapping[str, Any]], type[Any]]
#: names of tensors of a model that a base's checkpoint may lack
Optional = Callable[[nn.Module], Collection[str]]


def skeleton_of(folder: Path, find_class: FindClass, optional: Optional) -> nn.Module:
    """The model that a local folder describes, on the meta device, its checkpoint checked against it.

    Of the tensors that the model ties together, the checkpoint needs to hold only one.  Where it holds
    several that differ, they are not tied, whatever the configuration says: so does transformers.  Optional
    tensors that are not there, or have another shape, are noted, see `absent`.

    Args:
        folder: the folder.
        find_class: raises `ValueError` for a configuration that no class fits.
        optional: tells which tensors may be missing, such as those of a classifier's head.

    Raises:
        CheckpointError: the folder does not hold an intact safetensors checkpoint of this class.
    """
    return _described(folder, find_class, optional)[0]


def _described(folder: Path, find_class: FindClass, optional: Optional) -> tuple[nn.Module, ModelCheckpoint]:
    """The same, and the checkpoint, whose headers are read once."""
    reader, config = CheckpointReader(folder), read_config(folder)  # intact, before anything else opens it
    try:
        model_class = find_class(config)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    config_class = model_class.config_class
    wanted = config_class.model_type
    if config["model_type"] != wanted:
        raise CheckpointError(
            f"{folder / CONFIG}: model_type is {config['model_type']!r}, expected {wanted!r}"
        )
    model = skeleton(model_class, config_class, config, folder / CONFIG, len(reader))
    checkpoint = ModelCheckpoint(folder, model, reader=reader)
    first, may_lack = first_names(model), frozenset(optional(model))
    held = {first[name] for name in first if name in checkpoint}
    made, absent = computed(model), []
    for name, tensor in model.state_dict().items():
        if first[name] not in held:
            if name in made:
                continue
            if name not in may_lack:
                raise CheckpointError(f"{folder}: the tensor {name!r} of a {model_class.__name__} is missing")
            absent.append(name)
        if name not in checkpoint:
            continue
        found = checkpoint.described(name)
        if found.shape != tensor.shape:
            if name not in may_lack:
                shapes = f"{list(found.shape)}, {CONFIG} says {list(tensor.shape)}"
                raise CheckpointError(f"{folder}: {name} has shape {shapes}")
            absent.append(name)
        if tensor.is_floating_point() and not found.is_floating_point():
            raise CheckpointError(f"{folder}: {name} holds {found.dtype}; {DEQUANTISE}")
    _untie(model, first, checkpoint)
    note_absent(model, absent)
    return model, checkpoint


def load_model(folder: Path, find_class: FindClass, optional: Optional) -> nn.Module:
    """The model of a local folder in float32, in evaluation mode.

    Optional tensors that are not in the checkpoint are 0: transformers would draw them at random.

    Raises:
        CheckpointError: as in `skeleton_of`, and for weights that are NaN or infinite.
    """
    described, checkpoint = _described(folder, find_class, optional)
    expected, lacking, model_class = first_names(described), absent(described), cast(Any, type(described))
    with torch.random.fork_rng(devices=()):  # what is drawn here is replaced by 0
        model: nn.Module = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=bool(lacking),
        )
    note_absent(model, lacking)
    found = first_names(model)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            checkpoint[name]  # raises, with the count and the first index
        if found[name] != expected[name]:
            raise CheckpointError(
                f"{folder}: {name!r} and {found[name]!r} are one tensor in the model that transformers "
                f"makes of it, and {expected[name]!r} by the files"
            )
    return model.eval()


class BaseTensors(LazyTensors):
    """The tensors of the model that `load_model` makes of a folder, each read when it is asked for.

    Args:
        folder: the folder.
        model: its skeleton.
        dtype: which floating-point tensors have, once they have been rounded to float32 as in the model.

    Raises:
        CheckpointError: the folder does not hold an intact safetensors checkpoint; where a tensor is asked
            for, that it has NaN or infinite values.
    """

    def __init__(self, folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        super().__init__(self._shapes)
        self._first, self._absent, self._dtype = first_names(model), frozenset(absent(model)), dtype
        self._checkpoint = ModelCheckpoint(folder, model)
        self._held: dict[str, str] = {}
        for name in self._first:
            if name in self._checkpoint:
                self._held.setdefault(self._first[name], name)

    def files(self) -> set[str]:
        """The names that the tensors have in the files."""
        return self._checkpoint.files()

    def described(self, name: str) -> Tensor:
        if name in self._absent:
            return torch.empty(self._shapes[name], dtype=self._dtype, device="meta")
        tensor = self._checkpoint.described(self._held[self._first[name]])
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def rows(self, name: str, rows: Rows) -> Tensor:
        if name in self._absent:
            whole = torch.zeros((), dtype=self._dtype).expand(self._shapes[name])
            return whole[rows].clone()
        tensor = self._checkpoint.rows(self._held[self._first[name]], rows)
        return tensor.float().to(self._dtype) if tensor.is_floating_point() else tensor

    def in_rows(self, name: str) -> bool:
        return name in self._absent or self._checkpoint.in_rows(self._held[self._first[name]])


def computed(model: nn.Module) -> frozenset[str]:
    """The tensors that a class of transformers computes and keeps out of files, as sines of positions."""
    names = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return frozenset(names) & model.state_dict().keys()


def absent(model: nn.Module) -> tuple[str, ...]:
    """The optional tensors that a model's checkpoint did not hold; none where it was not loaded here."""
    return getattr(model, "absent_tensors", ())


def note_absent(model: nn.Module, names: Collection[str]) -> None:
    """Note in a model which of its tensors are from no checkpoint, and make these 0.

    It is not noted in the configuration: what is there would be saved with the model.
    """
    whole: Any = model
    whole.absent_tensors = tuple(names)
    for name, tensor in model.state_dict().items():
        if name in names and not tensor.is_meta:
            tensor.zero_()


def _untie(model: nn.Module, first: dict[str, str], checkpoint: ModelCheckpoint) -> None:
    """Give a parameter of its own to each tied name whose values in the checkpoint are not the first's."""
    known: dict[str, str] = {}
    for name in filter(checkpoint.__contains__, first):
        source = known.setdefault(first[name], name)
        if source != name and not same_values(checkpoint[source], checkpoint[name]):
            module, _, key = name.rpartition(".")
            alone = nn.Parameter(torch.empty_like(model.get_parameter(name)))
            setattr(model.get_submodule(module), key, alone)
