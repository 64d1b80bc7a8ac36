"""Base models from local folders in hub format, checked before transformers opens them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle.io.files import CheckpointError, contained, read_json
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import first_names
from mingle.tasks.skeletons import skeleton


def model_type(folder: str | Path) -> str:
    """The kind of model that the folder's ``config.json`` names, such as ``clip``.

    Raises:
        CheckpointError: no such file, or one without a model type.
    """
    path = contained(Path(folder), "config.json")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type in it")
    found: str = config["model_type"]
    return found


class HubModel(ABC):
    """A task type whose base model is a folder in hub format."""

    @abstractmethod
    def classes(self) -> tuple[type[Any], type[Any]]:
        """The classes in transformers of its models and of their configurations."""

    def skeleton(self, folder: str | Path) -> nn.Module:
        """The model that a local folder describes, on the meta device, its checkpoint checked against it.

        Of the tensors that the model ties together, the checkpoint needs to hold only one.

        Raises:
            CheckpointError: the folder does not hold an intact safetensors checkpoint of this class.
        """
        model_class, config_class = self.classes()
        folder, wanted = Path(folder), config_class.model_type
        reader = CheckpointReader(folder)  # intact and inside the folder, before anything else opens it
        if model_type(folder) != wanted:
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is {model_type(folder)!r}, expected {wanted!r}"
            )
        path = folder / "config.json"
        model = skeleton((model_class, config_class), read_json(path), path, len(reader))
        first = first_names(model)
        held = {first[name] for name in first if name in reader}
        for name, tensor in model.state_dict().items():
            if first[name] not in held:
                raise CheckpointError(f"{folder}: the tensor {name!r} of a {model_class.__name__} is missing")
            if name in reader and reader.shape(name) != tuple(tensor.shape):
                found, expected = list(reader.shape(name)), list(tensor.shape)
                raise CheckpointError(f"{folder}: {name} has shape {found}, config.json says {expected}")
        return model

    def load(self, folder: str | Path) -> nn.Module:
        """The model of a local folder in float32, in evaluation mode.

        Raises:
            CheckpointError: as in `skeleton`, and for weights that are NaN or infinite.
        """
        self.skeleton(folder)
        model: nn.Module = self.classes()[0].from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                CheckpointReader(folder).tensor(name)  # raises, with the count and the first index
        return model.eval()
