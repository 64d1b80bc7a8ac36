"""Sentence encoders: texts are classified by how near their embeddings are to those of the class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.io.files import CheckpointError, contained, read_json
from mingle.options import nearest, shown
from mingle.tasks.class_embeddings import ClassEmbeddingTask, check_class_embeddings, check_labels
from mingle.tasks.classification import auto_class, check_tokens, with_mask
from mingle.tasks.data import TaskData, class_names_of
from mingle.tasks.heads import Head

#: what cosines are multiplied by where the folder says nothing
SCALE = 20.0
#: texts in one pass
_BATCH = 128
_SETTINGS = "config_sentence_transformers.json"
#: folder → what is done there
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
POOLINGS = ("mean", "cls", "max", "lasttoken")
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}


class SentenceEncoderTask(ClassEmbeddingTask):
    """The task type ``sentence-encoder``: a BERT-like encoder, or a folder of sentence-transformers.

    Samples are mappings with ``input_ids`` and ``attention_mask`` [n, L] (``token_type_ids`` where the model
    has them), ``text_embeds`` [C, d], the unit-length embeddings of the class names (see `class_embeddings`),
    for evaluation ``labels`` [n], and, where predictions are to name them, ``class_names``.

    How tokens become one embedding is read from ``1_Pooling`` and noted in the module as
    ``sentence_pooling``; without it, it is their mean.  ``sentence_scale`` is what cosines are multiplied by.
    """

    name = "sentence-encoder"
    modality = "text"
    loads_as_stored = True

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples as `TaskData`.

        Raises:
            ValueError: a missing key, shapes that do not fit, class embeddings that are not finite or equal,
                or labels that are not classes; the message names the key.
        """
        given = with_mask(given)
        if not isinstance(given, TaskData):
            for key in ("input_ids", "text_embeds"):
                if key not in given:
                    raise ValueError(
                        f"the samples of a {self.name} task need {key!r}; got {', '.join(given)}"
                    )
            names = ("input_ids", "attention_mask", "token_type_ids")
            given = TaskData(
                {name: given[name] for name in names if name in given},
                {"text_embeds": given["text_embeds"]},
                given.get("labels"),
                class_names=class_names_of(given),
            )
        check_tokens(given.select(slice(0, 1)).inputs)
        head = given.shared["text_embeds"]
        self.check_head(Head({}, given.shared, given.class_names))
        check_labels(given, len(head))
        return given

    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """scale · cos(text, class name), [n, C]."""
        embedded, scale = embed(model, data.inputs), getattr(model, "sentence_scale", SCALE)
        return scale * embedded @ data.shared["text_embeds"].to(embedded).mT

    def base(self, model: nn.Module) -> nn.Module:
        """The encoder alone, where the module has a head."""
        whole: Any = model
        return whole.base_model if isinstance(getattr(model, "base_model", None), nn.Module) else model

    def prefixes(self, model: nn.Module) -> tuple[str, ...]:
        """Fine-tuned models may have heads, and then their tensors have a prefix."""
        prefix = getattr(model, "base_model_prefix", "")
        return (f"{prefix}.",) if prefix else ()

    def optional(self, model: nn.Module) -> tuple[str, ...]:
        """The pooler of BERT, which is not part of a sentence's embedding."""
        return tuple(name for name in model.state_dict() if name.startswith("pooler."))

    def files(self, model: nn.Module) -> dict[str, Any]:
        """With the pooling, in the layout of sentence-transformers, where one is noted."""
        files, whole = super().files(model), cast(Any, model)
        if not files or not hasattr(model, "sentence_pooling"):
            return files
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(_MODULES.items())
        ]
        pooling = {"word_embedding_dimension": whole.config.hidden_size} | {
            flag: mode == whole.sentence_pooling for flag, mode in _FLAGS.items()
        }
        return files | {
            "modules.json": modules,
            "1_Pooling/config.json": pooling,
            _SETTINGS: {"scale": whole.sentence_scale},
        }

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        return auto_class("AutoModel", config, "a model without a head")

    def skeleton(self, folder: str | Path) -> nn.Module:
        return _with_pooling(super().skeleton(folder), Path(folder))

    def load(self, folder: str | Path) -> nn.Module:
        return _with_pooling(super().load(folder), Path(folder))


def embed(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Unit-length embeddings of texts, [n, d].

    Args:
        model: the encoder.
        inputs: ``input_ids`` and ``attention_mask`` [n, L], and what else the model takes.
    """
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    hidden: Tensor = model(**given).last_hidden_state
    mask = given["attention_mask"].bool().unsqueeze(2)
    mode = getattr(model, "sentence_pooling", "mean")
    if mode == "mean":
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
    elif mode == "max":
        pooled = hidden.masked_fill(~mask, -torch.inf).amax(1)
    else:  # the first or the last token that counts, wherever the padding is
        places = torch.arange(mask.shape[1], device=device).expand(mask.shape[:2])
        counted = mask.squeeze(2)
        place = (
            places.masked_fill(~counted, mask.shape[1]).amin(1).clamp_max(mask.shape[1] - 1)
            if mode == "cls"
            else places.masked_fill(~counted, 0).amax(1)
        )
        pooled = hidden[torch.arange(len(hidden), device=device), place]
    return F.normalize(pooled, dim=-1)


@torch.no_grad()
def class_embeddings(model: nn.Module, tokenizer: Any, class_names: Sequence[str]) -> Tensor:
    """Unit-length embeddings of class names, [C, d].

    Args:
        model: the encoder, in evaluation mode.
        tokenizer: its tokenizer.
        class_names: C names.

    Raises:
        ValueError: embeddings that are not finite, or equal for two classes.
    """
    parts = []
    for start in range(0, len(class_names), _BATCH):
        names = list(class_names[start : start + _BATCH])
        parts.append(embed(model, tokenizer(names, padding=True, truncation=True, return_tensors="pt")))
    head = torch.cat(parts)
    check_class_embeddings(head, [f"class {name!r}" for name in class_names])
    return head


def _with_pooling(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the pooling of its folder noted in it."""
    whole: Any = model
    whole.sentence_pooling, whole.sentence_scale = read_pooling(folder)
    return model


def read_pooling(folder: Path) -> tuple[str, float]:
    """The way of pooling that a folder of sentence-transformers asks for, and what cosines are multiplied by.

    Raises:
        CheckpointError: modules other than a transformer, one way of pooling and a normalisation, or files
            that cannot be read; the message names the file and the key.
    """
    modules, scale, settings = folder / "modules.json", SCALE, folder / _SETTINGS
    if settings.exists():
        content = read_json(contained(folder, settings.name))
        given = content.get("scale", SCALE) if isinstance(content, dict) else None
        if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given < 1e6:
            raise CheckpointError(f"{settings}: scale is {shown(given)}, expected a positive number")
        scale = float(given)
    if not modules.exists():
        return "mean", scale
    listed = read_json(contained(folder, modules.name))
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)
        for entry in listed
    ):
        raise CheckpointError(f"{modules}: expected a list of modules with a type and a path")
    kinds: dict[str, str] = {}
    for entry in listed:
        kind = entry["type"].rpartition(".")[2]
        if kind in kinds:
            raise CheckpointError(f"{modules}: two modules {kind!r}; read is one of each kind")
        kinds[kind] = entry["path"]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds.get("Transformer"):
        what = f"a module {unknown[0]!r}" if unknown else f"a transformer in {kinds['Transformer']!r}"
        raise CheckpointError(
            f"{modules}: {what}; read are a transformer in the folder itself, Pooling, Normalize"
        )
    if "Pooling" not in kinds:
        return "mean", scale
    path = contained(folder, f"{kinds['Pooling']}/config.json")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    asked = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
    if mode := config.get("pooling_mode"):
        asked = list(map(str, mode)) if isinstance(mode, list) else [str(mode)]
    others = [
        key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value and key not in _FLAGS
    ]
    if len(asked) != 1 or asked[0] not in POOLINGS or others:
        found = ", ".join(map(str, asked + others)) or "none"
        raise CheckpointError(
            f"{path}: pooling_mode: {found}{nearest(found, POOLINGS)}; read is one of {', '.join(POOLINGS)}"
        )
    return asked[0], scale
