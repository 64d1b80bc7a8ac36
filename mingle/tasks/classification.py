"""Classifiers of images and of texts: a transformer that is merged, and a head for every task."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mingle.io.state_dicts import IncompatibleModel
from mingle.tasks.base import TaskType
from mingle.tasks.configs import config_class_of
from mingle.tasks.data import TaskData, class_names_of
from mingle.tasks.heads import Head, names_of
from mingle.tasks.labels import ONE_CLASS, labels_of
from mingle.tasks.loading import absent, note_absent
from mingle.tasks.precision import given_to

#: endings of the names of classes in transformers that have a classifier's head
_CLASSIFIERS = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",  # DeiT's that were distilled
)


class ClassificationTask(TaskType):
    """Any model of a class ``AutoModelFor…Classification``.

    What such a model has beside its transformer is its head.  Each task keeps its own, of any number of
    classes; `mingle.Merger.model_for` puts it into the merged model.  So do parts of the transformer that the
    base's checkpoint lacks, such as a pooler that pre-training did not use: fine-tuning has made them up.
    """

    #: what samples need, and may have
    needed: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    #: the name in transformers of the class that finds the model class
    auto: ClassVar[str]

    @abstractmethod
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` for one row of inputs of a wrong shape."""

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples as `TaskData`.

        Raises:
            ValueError: a missing key, shapes that do not fit, or labels that are not one per sample; the
                message names the key.
        """
        if not isinstance(given, TaskData):
            if self.needed not in given:
                found = ", ".join(given) or "nothing"
                raise ValueError(f"the samples of a {self.name} task need {self.needed!r}; got {found}")
            known = (self.needed, *self.others)
            given = TaskData(
                {key: given[key] for key in known if key in given},
                {},
                given.get("labels"),
                class_names=class_names_of(given),
            )
        self.check_inputs(given.select(slice(0, 1)).inputs)
        if given.labels is not None and given.labels.shape != (len(given),):
            shape = list(given.labels.shape)
            raise ValueError(f"labels {shape}: expected [{len(given)}], one per sample")
        return given

    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """The scores of the classes of the head that is in the model, [n, C]."""
        result: Tensor = model(**given_to(model, data.inputs)).logits
        return result

    def base(self, model: nn.Module) -> nn.Module:
        """A model with a head, of any number of classes, around a transformer that has none or another one.

        Raises:
            ValueError: transformers has no such class for it, or the transformer lacks a tensor.
        """
        whole: Any = model
        if not hasattr(model, "base_model") or type(model).__name__.endswith(_CLASSIFIERS):
            return model
        wanted = self.model_class(whole.config.to_dict())
        with torch.random.fork_rng(devices=()):  # what is drawn here is replaced
            made: Any = wanted(copy.deepcopy(whole.config)).to(whole.device, whole.dtype).eval()
        inside, given = self.tower(made), whole.base_model.state_dict()
        lacking = [name for name in made.base_model.state_dict() if name not in given]
        made.base_model.load_state_dict(given, strict=False)
        may_lack = self.optional(made)
        if needed := [name for name in lacking if f"{inside}.{name}" not in may_lack]:
            raise ValueError(
                f"{type(model).__name__}: no {needed[0]!r} in it, which a {wanted.__name__} has: give one"
            )
        note_absent(made, [name for name in may_lack if name.removeprefix(f"{inside}.") not in given])
        return made.requires_grad_(False)

    def tower(self, model: nn.Module) -> str:
        """The transformer below the head: the part that the model's class names, or that alone has blocks.

        Raises:
            ValueError: neither is there.
        """
        prefix: str = getattr(model, "base_model_prefix", "")
        if prefix and hasattr(model, prefix):
            return prefix
        with_blocks = [
            name
            for name, child in model.named_children()
            if any(isinstance(module, nn.ModuleList) for module in child.modules())
        ]
        if len(with_blocks) != 1:
            found = ", ".join(with_blocks) or "no part with a list of blocks"
            raise ValueError(
                f"{type(model).__name__}: its transformer cannot be told from its head ({found}); give a "
                "task_type of your own, see mingle.tasks.TaskType"
            )
        return with_blocks[0]

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        inside, missing = f"{self.tower(model)}.", absent(model)
        return tuple(name for name in self.optional(model) if not name.startswith(inside) or name in missing)

    def labels(self, head: Mapping[str, Tensor], config: Path | Any) -> tuple[str, ...] | None:
        names = labels_of(config)
        if len(names_of(Head(head, {}, names))) == 1:
            raise IncompatibleModel(f"its head gives a single number, as for regression; {ONE_CLASS}")
        rows = {len(tensor) for tensor in head.values() if tensor.dim()}
        if names is not None and len(names) not in rows and not isinstance(config, Path):
            return None  # in memory, a head may have been replaced and the names of the old one kept
        self.check_head(Head(head, {}, names))
        return names

    def check_head(self, head: Head) -> None:
        rows = {len(tensor) for tensor in head.tensors.values() if tensor.dim()}
        if head.labels is not None and len(head.labels) not in rows:
            raise IncompatibleModel(
                f"there are names for {len(head.labels)} classes, and no tensor of the head has as many rows"
            )

    def optional(self, model: nn.Module) -> tuple[str, ...]:
        inside = f"{self.tower(model)}."
        return tuple(name for name in model.state_dict() if not name.startswith(inside) or "pooler." in name)

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        """The class with a head for this kind of model, whatever head its own class has."""
        return auto_class(self.auto, config, f"a {self.name} head")


def auto_class(auto: str, config: Mapping[str, Any], what: str) -> type[Any]:
    """The class in transformers that one of its auto-classes finds for a ``config.json``; its own, if it can.

    Args:
        auto: the name of the auto-class.
        config: the configuration.
        what: the model has in such a class, for the message.

    Raises:
        ValueError: transformers does not know this kind of model, or has no such class for it.
    """
    import transformers

    mapping, config_class = getattr(transformers, auto)._model_mapping, config_class_of(config)
    if config_class not in mapping:
        raise ValueError(f"model_type: transformers has no {config['model_type']!r} with {what}")
    found = mapping[config_class]
    classes: tuple[type[Any], ...] = found if isinstance(found, tuple) else (found,)
    own = config.get("architectures")
    named = own if isinstance(own, list) else []
    return next((each for each in classes if each.__name__ in named), classes[0])


class ImageClassificationTask(ClassificationTask):
    """The task type ``image-classification``: samples have ``pixel_values`` [n, 3, H, W]."""

    name = "image-classification"
    modality = "image"
    needed = "pixel_values"
    auto = "AutoModelForImageClassification"

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        pixels = inputs["pixel_values"]
        if pixels.dim() != 4:
            raise ValueError(f"pixel_values {list(pixels.shape)}: expected [n, 3, H, W]")


class TextClassificationTask(ClassificationTask):
    """The task type ``text-classification``.

    Samples have ``input_ids`` and ``attention_mask`` [n, L], and ``token_type_ids`` where the model has them.
    """

    name = "text-classification"
    modality = "text"
    needed = "input_ids"
    others = ("attention_mask", "token_type_ids")
    auto = "AutoModelForSequenceClassification"

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        return super().data(with_mask(given))

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        check_tokens(inputs)


def with_mask(given: TaskData | Mapping[str, Any]) -> TaskData | Mapping[str, Any]:
    """Samples with an ``attention_mask``: where there is none, every token counts."""
    if isinstance(given, TaskData) or "attention_mask" in given or "input_ids" not in given:
        return given
    return {**given, "attention_mask": torch.ones_like(given["input_ids"])}


def check_tokens(inputs: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless token ids and all that belongs to them are [n, L]."""
    ids = inputs["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"input_ids {list(ids.shape)} of {ids.dtype}: expected whole numbers [n, L]")
    for name in ("attention_mask", "token_type_ids"):
        if name in inputs and inputs[name].shape != ids.shape:
            raise ValueError(
                f"{name} {list(inputs[name].shape)} and input_ids {list(ids.shape)}: expected [n, L] for both"
            )
