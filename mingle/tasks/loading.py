"""Base models from local folders in hub format, checked before transformers opens them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import DEQUANTISE, first_names, same_values
from mingle.tasks.configs import CONFIG, read_config
from mingle.tasks.skeletons import skeleton


def model_type(folder: str | Path) -> str:
    """The kind of model that the folder's ``config.json`` names, such as ``clip``.

    Raises:
        CheckpointError: no such file, or one without a model type.
    """
    found: str = read_config(Path(folder))["model_type"]
    return found


class HubModel(ABC):
    """A task type whose base model is a folder in hub format."""

    @abstractmethod
    def classes(self) -> tuple[type[Any], type[Any]]:
        """The classes in transformers of its models and of their configurations."""

    def skeleton(self, folder: str | Path) -> nn.Module:
        """The model that a local folder describes, on the meta device, its checkpoint checked against it.

        Of the tensors that the model ties together, the checkpoint needs to hold only one.  Where it holds
        several that differ, they are not tied, whatever the configuration says: so does transformers.

        Raises:
            CheckpointError: the folder does not hold an intact safetensors checkpoint of this class.
        """
        model_class, config_class = self.classes()
        folder, wanted = Path(folder), config_class.model_type
        reader = CheckpointReader(folder)  # intact and inside the folder, before anything else opens it
        config = read_config(folder)
        if config["model_type"] != wanted:
            raise CheckpointError(
                f"{folder / CONFIG}: model_type is {config['model_type']!r}, expected {wanted!r}"
            )
        model = skeleton(model_class, config_class, config, folder / CONFIG, len(reader))
        first = first_names(model)
        held = {first[name] for name in first if name in reader}
        for name, tensor in model.state_dict().items():
            if first[name] not in held:
                raise CheckpointError(f"{folder}: the tensor {name!r} of a {model_class.__name__} is missing")
            if name not in reader:
                continue
            if reader.shape(name) != tuple(tensor.shape):
                found, expected = list(reader.shape(name)), list(tensor.shape)
                raise CheckpointError(f"{folder}: {name} has shape {found}, {CONFIG} says {expected}")
            if tensor.is_floating_point() and not reader.dtype(name).is_floating_point:
                raise CheckpointError(f"{folder}: {name} holds {reader.dtype(name)}; {DEQUANTISE}")
        _untie(model, first, reader)
        return model

    def load(self, folder: str | Path) -> nn.Module:
        """The model of a local folder in float32, in evaluation mode.

        Raises:
            CheckpointError: as in `skeleton`, and for weights that are NaN or infinite.
        """
        expected = first_names(self.skeleton(folder))
        model: nn.Module = self.classes()[0].from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        found = first_names(model)
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                CheckpointReader(folder).tensor(name)  # raises, with the count and the first index
            if found[name] != expected[name]:
                raise CheckpointError(
                    f"{folder}: {name!r} and {found[name]!r} are one tensor in the model that transformers "
                    f"makes of it, and {expected[name]!r} by the files"
                )
        return model.eval()


def _untie(model: nn.Module, first: dict[str, str], reader: CheckpointReader) -> None:
    """Give a parameter of its own to each tied name whose values in the checkpoint are not the first's."""
    sources: dict[str, str] = {}
    for name in filter(reader.__contains__, first):
        source = sources.setdefault(first[name], name)
        if source != name and not same_values(reader.tensor(source), reader.tensor(name)):
            module, _, key = name.rpartition(".")
            alone = nn.Parameter(torch.empty_like(model.get_parameter(name)))
            setattr(model.get_submodule(module), key, alone)
