"""Zero-shot image classification with CLIP or SigLIP: vision towers are merged, texts are the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import nn

from mingle.tasks.class_embeddings import ClassEmbeddingTask, check_class_embeddings, check_labels
from mingle.tasks.classification import auto_class
from mingle.tasks.data import TaskData, class_names_of
from mingle.tasks.heads import Head
from mingle.tasks.image_processor import ImageProcessor
from mingle.tasks.pixels import upright_rgb
from mingle.tasks.precision import given_to

_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class ClipTask(ClassEmbeddingTask):
    """The task type ``clip``: any `transformers.CLIPModel` or `transformers.SiglipModel`, SigLIP 2 included.

    Samples are mappings with ``pixel_values`` [n, 3, H, W], as the model's image processor makes them (or,
    for images of any aspect, patches [n, N, P] with ``pixel_attention_mask`` and ``spatial_shapes``),
    ``text_embeds`` [C, P], the unit-length embeddings of the classes (see `zero_shot_head`), for evaluation
    ``labels`` [n], and, where predictions are to name them, ``class_names``.
    """

    name = "clip"
    modality = "image"
    config_part = "vision_config"
    published_sets: ClassVar = {
        "nufilt": (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1")
    }

    def tower(self, model: nn.Module) -> str:
        return "vision_model"

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        """The class with both towers."""
        return auto_class("AutoModelForZeroShotImageClassification", config, "two towers")

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples as `TaskData`.

        Raises:
            ValueError: a missing key, shapes that do not fit, class embeddings that are not finite or equal,
                or labels that are not classes; the message names the key.
        """
        if not isinstance(given, TaskData):
            for key in ("pixel_values", "text_embeds"):
                if key not in given:
                    raise ValueError(f"the samples of a clip task need {key!r}; got {', '.join(given)}")
            given = TaskData(
                {name: given[name] for name in _INPUTS if name in given},
                {"text_embeds": given["text_embeds"]},
                given.get("labels"),
                class_names=class_names_of(given),
            )
        first, head = given.select(slice(0, 1)).inputs, given.shared["text_embeds"]
        pixels = first["pixel_values"]
        if pixels.dim() != (3 if "spatial_shapes" in first else 4) or head.dim() != 2:
            raise ValueError(
                f"pixel_values {list(pixels.shape)} and text_embeds {list(head.shape)}: "
                "expected [n, 3, H, W] and [C, P]"
            )
        self.check_head(Head({}, given.shared, given.class_names))
        check_labels(given, len(head))
        return given

    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        """exp(s) · cos(image, text) + b [n, C], with the model's own logit scale s; CLIP has no bias b.

        ALIGN has a temperature, 1 / exp(s), in the scale's place.
        """
        clip: Any = model
        pooled = clip.vision_model(**given_to(model, data.inputs)).pooler_output
        image = F.normalize(_projected(clip, "visual_projection", pooled), dim=-1)
        scale = clip.logit_scale.exp() if hasattr(clip, "logit_scale") else 1 / clip.temperature
        scaled: torch.Tensor = scale * image @ data.shared["text_embeds"].to(image).mT
        bias: torch.Tensor | None = getattr(clip, "logit_bias", None)  # SigLIP judges each class by itself
        return scaled if bias is None else scaled + bias


@torch.no_grad()
def zero_shot_head(
    model: Any, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """The zero-shot classifier, [C, P].

    The text embedding of every template is normalised, averaged over the templates, and normalised again.

    Args:
        model: a `transformers.CLIPModel`.
        tokenizer: its tokenizer.
        class_names: C names.
        templates: prompts with ``{}`` in the name's place.

    Raises:
        ValueError: as in `prompt_tokens`; or embeddings that are not finite, or equal for two classes.
    """
    device = model.logit_scale.device
    embeddings = []
    for tokens in prompt_tokens(model.config, tokenizer, class_names, templates):
        pooled = model.text_model(**{name: part.to(device) for name, part in tokens.items()}).pooler_output
        embeddings.append(F.normalize(_projected(model, "text_projection", pooled), dim=-1))
    head = F.normalize(torch.stack(embeddings).mean(0), dim=-1)
    check_class_embeddings(head, [f"class {name!r}" for name in class_names])
    return head


def _projected(model: Any, name: str, pooled: torch.Tensor) -> torch.Tensor:
    """The output of a tower in the common space, to which those of SigLIP map by themselves."""
    projection = getattr(model, name, None)
    return pooled if projection is None else projection(pooled)


def prompt_tokens(
    config: Any, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]
) -> list[Mapping[str, torch.Tensor]]:
    """The tokens of all classes' prompts: ``input_ids`` and ``attention_mask`` [C, L] for each template.

    Prompts are cut to as many tokens as the text tower takes.  Those of SigLIP are filled up to that length
    and have no mask: it was trained to read the padding too.

    Args:
        config: the `transformers.CLIPConfig` of the model.
        tokenizer, class_names, templates: see `zero_shot_head`.

    Raises:
        ValueError: a vocabulary that knows no part of any prompt; a token without an embedding; an end token
            other than the model's; two classes whose prompts are the same tokens.
    """
    masked = config.model_type == "clip"
    text, where = config.text_config, tokenizer.name_or_path or "tokenizer"
    length = int(min(tokenizer.model_max_length, text.max_position_embeddings))
    encoded = [
        tokenizer(
            [template.format(name) for name in class_names],
            padding=True if masked else "max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        for template in templates
    ]
    ids = torch.cat([tokens["input_ids"].flatten() for tokens in encoded])
    if set(ids.tolist()) <= set(tokenizer.all_special_ids):
        raise ValueError(f"{where}: its vocabulary knows no part of {templates[0].format(class_names[0])!r}")
    if ids.max() >= text.vocab_size:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise ValueError(
            f"{where}: the token {token!r} has the number {int(ids.max())}, and the vocab_size of the text "
            f"tower is {text.vocab_size}"
        )
    # With 2, which early configurations have, transformers pools at the greatest number instead.
    if (
        masked
        and text.eos_token_id != 2
        and not all(bool((tokens["input_ids"] == text.eos_token_id).any(1).all()) for tokens in encoded)
    ):
        raise ValueError(
            f"{where}: prompts end with the token {tokenizer.eos_token_id}, and the eos_token_id of the text "
            f"tower is {text.eos_token_id}"
        )
    first: dict[tuple[Any, ...], str] = {}
    for row, name in enumerate(class_names):
        prompts = tuple(
            tuple(tokens["input_ids"][row][tokens["attention_mask"][row].bool() if masked else ...].tolist())
            for tokens in encoded
        )
        if prompts in first:
            raise ValueError(
                f"{where}: the classes {first[prompts]!r} and {name!r} are the same tokens in every prompt"
            )
        first[prompts] = name
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    return [{name: tokens[name] for name in names} for tokens in encoded]


def processor_pixels(folder: str | Path, images: Sequence[Any]) -> torch.Tensor:
    """Images through the image processor of a local hub folder: float32 [n, 3, H, W].

    Args:
        folder: holds the processor's configuration.
        images: PIL images of any mode, or uint8 arrays [3, H, W].

    Raises:
        CheckpointError: no image processor, or a broken one.
        ImageError: an image that has no place in 8-bit RGB; see `mingle.tasks.pixels`.
    """
    arrays = [upright_rgb(image) if isinstance(image, Image) else image for image in images]
    return ImageProcessor(folder)(arrays)
