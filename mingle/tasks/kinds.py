"""Which kind of model a base is: by what its configuration says of it, and by the head that it has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mingle.io.files import CheckpointError, contained
from mingle.tasks.configs import CONFIG, config_class_of, read_config

logger = logging.getLogger(__name__)

#: endings of the names of classes in transformers → the task type of such models
_HEADS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}


def kind_of(model: nn.Module | str | Path) -> str:
    """The name of the task type of a base model, a module or a local folder in hub format.

    Raises:
        CheckpointError: a folder without a readable configuration, or with one of an unknown kind of model.
        ValueError: a module of an unknown kind.
    """
    if isinstance(model, nn.Module):
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "model_type"):
            raise ValueError(
                f"{type(model).__name__} is not a model of transformers: give a task_type of your own, see "
                "mingle.tasks.TaskType"
            )
        return _kind(config.to_dict() | {"architectures": [type(model).__name__]}, type(model).__name__)
    folder = Path(model)
    config = read_config(folder)
    if (folder / "modules.json").exists():
        contained(folder, "modules.json")
        return "sentence-encoder"
    try:
        return _kind(config, str(folder))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def _kind(config: Mapping[str, Any], where: str) -> str:
    import transformers

    kind, config_class = config["model_type"], config_class_of(config)
    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else ""
    known: dict[str, Any] = {
        "clip": transformers.AutoModelForZeroShotImageClassification,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "sentence-encoder": transformers.AutoModelForMaskedLM,
        "causal-lm": transformers.AutoModelForCausalLM,
    }
    possible = [task for task, auto in known.items() if config_class in auto._model_mapping]
    for ending, task in _HEADS.items():
        if name.endswith(ending):
            if task in possible:
                return task
            # of another kind, such as speech: only a task whose models are of this very class will do
            possible = [
                other for other in possible if name in _class_names(known[other]._model_mapping[config_class])
            ]
    # Without a head that decides: two towers, or an encoder with a decoder, before parts of either.
    for task in ("clip", "seq2seq", "sentence-encoder", "causal-lm", "image-classification"):
        if task in possible:
            if task == "sentence-encoder" and "text-classification" in possible:
                logger.warning(
                    "%s: a %s without a classifier's head is taken for a sentence-encoder; say so by the "
                    "task_type sentence-encoder, or text-classification where fine-tuned models have heads",
                    where,
                    name or kind,
                )
            return task
    raise ValueError(
        f"{name or kind}: mingle has no task type for it (known are {', '.join(known)}); give one of your "
        "own, see mingle.tasks.TaskType"
    )


def _class_names(found: Any) -> list[str]:
    return [each.__name__ for each in (found if isinstance(found, tuple) else (found,))]
