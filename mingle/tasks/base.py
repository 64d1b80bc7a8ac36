"""What merging needs to know about a kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mingle.nn.inject import matches
from mingle.nn.replay import replayed
from mingle.options import shown
from mingle.tasks import loading
from mingle.tasks.configs import CONFIG
from mingle.tasks.data import TaskData, class_names_of
from mingle.tasks.heads import Head, common_part, head_of, put_head
from mingle.tasks.structure import Structure, find_structure, run_example
from mingle.tasks.token_ids import check_token_ids
from mingle.tasks.vocabulary import Vocabulary


class TaskType(ABC):
    """A kind of model: how a batch becomes logits, and what counts as right.

    A subclass has to say what its `logits` are; everything else has a default, which suits a model of
    transformers that is fine-tuned as a whole and answers with one class per sample.

    Attributes:
        name: under which merged models note it; the class's own where none is given.
        one_class: whether an answer is one class, so that answers of several tasks can be compared.
        shared: what the samples of a task share and stands in for its head, such as ``text_embeds``.
        one_scale: whether scores of different tasks' classes can be compared as they are.
        modality: what a sample is to a person, ``image`` or ``text``, which the files of a base's folder turn
            into inputs, see `mingle.tasks.readers`; None where nobody knows.
        config_part: the name of the tower's configuration in the model's; empty where the tower is the whole
            model.
        loads_as_stored: whether the tensors of the model that `load` makes are those in the files, so that
            they can be read one by one.  A class with a `load` of its own has to say so.
        published_sets: sets of layers that a paper names, as suffixes, instead of those that are found.  They
            count where the model has layers of these names.
    """

    name: ClassVar[str]
    one_class: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ()
    one_scale: ClassVar[bool] = False
    modality: ClassVar[Literal["image", "text"] | None] = None
    config_part: ClassVar[str] = ""
    loads_as_stored: ClassVar[bool] = True
    published_sets: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if "load" in vars(cls) and "loads_as_stored" not in vars(cls):
            cls.loads_as_stored = False

    @abstractmethod
    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """Class scores of a batch, [n, C], or [n, L, C] with one row per position of the answers.

        They are differentiable where gradients are on.
        """

    def vocabulary(self, model: nn.Module, data: TaskData) -> Vocabulary | None:
        """The head that makes the logits of answers with many positions; None where there is no such head.

        Where whole logits would be too large, adaptation makes them of a few positions at a time, and only of
        those that are `valid`.

        Args:
            model: in evaluation mode.
            data: samples to try it on.
        """
        return None

    def states(self, model: nn.Module, vocabulary: Vocabulary, data: TaskData) -> Tensor:
        """What the head makes `logits` of, [n, L, d]."""
        return vocabulary.inputs(lambda: self.logits(model, data))

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Checked samples: ``labels`` are the targets, all other tensors are inputs with a row per sample.

        ``class_names``, which may be there, are texts.

        Raises:
            ValueError: no inputs, something that is not a tensor, or numbers of rows that differ.
        """
        if isinstance(given, TaskData):
            return given
        names = class_names_of(given)
        inputs = {name: tensor for name, tensor in given.items() if name not in ("labels", "class_names")}
        checked = {**inputs, **({"labels": given["labels"]} if given.get("labels") is not None else {})}
        for name, tensor in checked.items():
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                raise ValueError(f"{name}: {shown(tensor)}: expected a tensor with one row per sample")
        rows = {name: len(tensor) for name, tensor in checked.items()}
        if not inputs:
            raise ValueError(f"samples with {', '.join(given) or 'nothing'}: expected inputs")
        if len(set(rows.values())) > 1:
            raise ValueError(f"samples with inputs of {rows} rows: expected one row per sample in each")
        return TaskData(inputs, {}, given.get("labels"), class_names=names)

    def samples(self, model: nn.Module, given: TaskData | Mapping[str, Any]) -> TaskData:
        """The same, once it is certain that the model can read them.

        Raises:
            ValueError: see `data`; also tokens that the model does not know.
        """
        data = self.data(given)
        check_token_ids(model, data)
        return data

    def outcomes(self, model: nn.Module, data: TaskData) -> Tensor:
        """The result for each sample: 1 or 0, right or wrong, [n]; or numbers given and wanted, [n, 2].

        See `mingle.merging.evaluate.score`.

        Raises:
            ValueError: samples without labels.
        """
        return (self.logits(model, data).argmax(-1).cpu() == required_labels(data).cpu()).double()

    def union(self, model: nn.Module, data: TaskData, heads: Sequence[Head]) -> list[Tensor]:
        """The scores of the classes of every task for the same samples, [n, C] for each head.

        What all heads have in common is computed once.

        Args:
            model: is afterwards as it was.
            data: what its samples share does not count.
            heads: of the tasks, one or more.
        """
        part = common_part(model, self.tower(model), heads[0].tensors)
        scores, served = [], head_of(model, heads[0].tensors)
        try:
            with replayed(model, part) as replay:
                for head in heads:
                    put_head(model, head.tensors)
                    replay.again()
                    scores.append(self.logits(model, replace(data, shared=head.shared)))
        finally:
            put_head(model, served)
        return scores

    def written(self, model: nn.Module, data: TaskData, length: int) -> Tensor:
        """The greedy answer to one sample, where answers are texts: token ids, at most `length` of them.

        Raises:
            ValueError: another task type, or a prompt that leaves no room for an answer.
        """
        raise ValueError(f"the answers of a {self.name} model are not texts")

    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """Seed samples completed by what only the fine-tuned model can tell, such as its own answers.

        Nothing is taken from labels.  All of several processes call it.
        """
        return seeds

    def valid(self, data: TaskData) -> Tensor | None:
        """Which positions of the answers count, bool [n, L]; None where an answer has one."""
        return None

    def reduce_for(self, structure: Structure, layer: str, reduce: str) -> str:
        """The reduction of the gates of a layer of the tower, where `reduce` is asked for."""
        return reduce

    def base(self, model: nn.Module) -> nn.Module:
        """A base model that was given as a module, as this task type needs it.

        Raises:
            ValueError: it cannot be one.
        """
        return model

    def tower(self, model: nn.Module) -> str:
        """The dotted name of the sub-module that is merged; empty where it is the whole model."""
        return ""

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the model's tensors that each task has of its own: kept with it, never merged."""
        return ()

    def labels(self, head: Mapping[str, Tensor], config: Path | Any) -> tuple[str, ...] | None:
        """The names of the classes of a fine-tuned model's head; None where they are not known.

        Args:
            head: the head, by names in the model; tensors may be on the meta device.
            config: the model's folder, or its configuration; None where there is neither.

        Raises:
            IncompatibleModel: a head that is not one of this task type.
        """
        return None

    def check_head(self, head: Head) -> None:  # noqa: B027 – most have no heads
        """Raise `ValueError` for a head that is not one, or for names of another number of classes."""

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
        everything = [name for name, _ in tower.named_modules()]
        for name, suffixes in self.published_sets.items():
            chosen = [layer for layer in layers["full"] if any(matches(layer, suffix) for suffix in suffixes)]
            if chosen:
                used = tuple(suffix for suffix in suffixes if any(matches(n, suffix) for n in chosen))
                selected = [n for n in everything if any(matches(n, suffix) for suffix in used)]
                layers[name] = tuple(chosen)
                sets[name] = used if set(selected) == set(chosen) else tuple(chosen)
        return replace(found, sets=sets, layers=layers)

    def run(self, tower: nn.Module, samples: int, device: torch.device) -> None:
        """Pass as many samples through a tower, whatever they are: its structure is found in this way.

        Raises:
            AttributeError, TypeError, …: nobody knows how; then it is judged by the order of layers.
        """
        run_example(tower, samples, device)

    def files(self, model: nn.Module) -> dict[str, Any]:
        """What a folder of the model holds beside its weights: contents of JSON files by their names.

        Asked for where the model did not come from a folder.  Empty where it has no configuration.
        """
        described = {CONFIG: "config", "generation_config.json": "generation_config"}
        found: dict[str, Any] = {file: getattr(model, name, None) for file, name in described.items()}
        files = {file: part.to_dict() for file, part in found.items() if hasattr(part, "to_dict")}
        if CONFIG in files:
            files[CONFIG] |= {"architectures": [type(model).__name__]}
        return files

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
        return loading.skeleton_of(Path(folder), self.model_class, self.optional)

    def load(self, folder: str | Path) -> nn.Module:
        """A base model from a local folder in hub format, in float32, in evaluation mode.

        Raises:
            CheckpointError: as in `skeleton`, and for weights that are NaN or infinite.
        """
        return loading.load_model(Path(folder), self.model_class, self.optional)


def required_labels(data: TaskData) -> Tensor:
    """The labels of samples; none raise `ValueError`."""
    if data.labels is None:
        raise ValueError("these samples have no labels to compare with")
    return data.labels
