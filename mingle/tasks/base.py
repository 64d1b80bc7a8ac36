"""What merging needs to know about a kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mingle.io.files import CheckpointError
from mingle.nn.inject import matches
from mingle.options import shown
from mingle.tasks import loading
from mingle.tasks.configs import CONFIG
from mingle.tasks.data import TaskData
from mingle.tasks.structure import Structure, find_structure, run_example


class TaskType(ABC):
    """A kind of model: how a batch becomes logits, and what counts as right.

    A subclass has to say what its `logits` are; everything else has a default, which suits a model of
    transformers that is fine-tuned as a whole and answers with one class per sample.

    Attributes:
        name: under which merged models note it; the class's own where none is given.
        config_part: the name of the tower's configuration in the model's; empty where the tower is the whole
            model.
        published_sets: sets of layers that a paper names, as suffixes, instead of those that are found.  They
            count where the model has layers of these names.
    """

    name: ClassVar[str]
    config_part: ClassVar[str] = ""
    published_sets: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @abstractmethod
    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """Class scores of a batch, [n, C], or [n, L, C] with one row per position of the answers.

        They are differentiable where gradients are on.
        """

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Checked samples: ``labels`` are the targets, all other tensors are inputs with a row per sample.

        Raises:
            ValueError: no inputs, something that is not a tensor, or numbers of rows that differ.
        """
        if isinstance(given, TaskData):
            return given
        inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
        checked = {**inputs, **({"labels": given["labels"]} if given.get("labels") is not None else {})}
        for name, tensor in checked.items():
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                raise ValueError(f"{name}: {shown(tensor)}: expected a tensor with one row per sample")
        rows = {name: len(tensor) for name, tensor in checked.items()}
        if not inputs or len(set(rows.values())) > 1:
            raise ValueError(
                f"samples with inputs of {rows or 'no'} rows: expected one row per sample in each"
            )
        return TaskData(inputs, {}, given.get("labels"))

    def outcomes(self, model: nn.Module, data: TaskData) -> Tensor:
        """The result for each sample: 1 or 0, right or wrong, [n]; or numbers given and wanted, [n, 2].

        See `mingle.merging.evaluate.score`.

        Raises:
            ValueError: samples without labels.
        """
        return (self.logits(model, data).argmax(-1).cpu() == required_labels(data).cpu()).double()

    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """Seed samples completed by what only the fine-tuned model can tell, such as its own answers.

        Nothing is taken from labels.
        """
        return seeds

    def valid(self, data: TaskData) -> Tensor | None:
        """Which positions of the answers count, bool [n, L]; None where an answer has one."""
        return None

    def reduce_for(self, structure: Structure, layer: str, reduce: str) -> str:
        """The reduction of the gates of a layer of the tower, where `reduce` is asked for."""
        return reduce

    def tower(self, model: nn.Module) -> str:
        """The dotted name of the sub-module that is merged; empty where it is the whole model."""
        return ""

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the model's tensors that each task has of its own: kept with it, never merged."""
        return ()

    def optional(self, model: nn.Module) -> Collection[str]:
        """The names of the model's tensors that a base's checkpoint may lack; they are then 0."""
        return ()

    def prefixes(self, model: nn.Module) -> tuple[str, ...]:
        """What a fine-tuned checkpoint may put before the tower's own parameter names, longest first."""
        tower = self.tower(model)
        return (f"{tower}.",) if tower else ()

    def structure(self, model: nn.Module) -> Structure:
        """The blocks of a model's tower and its sets of layers, with the published sets in their places.

        Raises:
            ValueError: see `mingle.tasks.structure.find_structure`.
        """
        tower = model.get_submodule(self.tower(model))
        found = find_structure(tower, self.run)
        sets = {**found.sets, "nufilt": found.sets["full"]}
        layers = {**found.layers, "nufilt": found.layers["full"]}
        for name, suffixes in self.published_sets.items():
            chosen = [layer for layer in layers["full"] if any(matches(layer, suffix) for suffix in suffixes)]
            if chosen:
                layers[name] = tuple(chosen)
                sets[name] = tuple(s for s in suffixes if any(matches(layer, s) for layer in chosen))
        return replace(found, sets=sets, layers=layers)

    def run(self, tower: nn.Module, samples: int, device: torch.device) -> None:
        """Pass as many samples through a tower, whatever they are: its structure is found in this way.

        Raises:
            AttributeError, TypeError, …: nobody knows how; then it is judged by the order of layers.
        """
        run_example(tower, samples, device)

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        """The class in transformers of a base model with this ``config.json``.

        Raises:
            ValueError: transformers has no such class.
        """
        import transformers

        names = config.get("architectures") or []
        name = names[0] if isinstance(names, list) and names else None
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
            raise ValueError(f"architectures: transformers has no class {shown(name)}")
        return found

    def skeleton(self, folder: str | Path) -> nn.Module:
        """The model a folder describes, on the meta device, its checkpoint checked against it.

        Raises:
            CheckpointError: the folder does not hold an intact safetensors checkpoint of this kind.
        """
        return loading.skeleton_of(Path(folder), self._class_in(Path(folder)), self.optional)

    def load(self, folder: str | Path) -> nn.Module:
        """A base model from a local folder in hub format, in float32, in evaluation mode.

        Raises:
            CheckpointError: as in `skeleton`, and for weights that are NaN or infinite.
        """
        return loading.load_model(Path(folder), self._class_in(Path(folder)), self.optional)

    def _class_in(self, folder: Path) -> type[Any]:
        try:
            return self.model_class(loading.read_base_config(folder))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def required_labels(data: TaskData) -> Tensor:
    """The labels of samples; none raise `ValueError`."""
    if data.labels is None:
        raise ValueError("these samples have no labels to compare with")
    return data.labels
