"""Zero-shot image classification with CLIP: a fine-tuned vision tower, and the base's text tower as head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import nn

from mingle.tasks import TaskData
from mingle.tasks.image_processor import ImageProcessor
from mingle.tasks.loading import HubModel
from mingle.tasks.pixels import upright_rgb

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class ClipTask(HubModel):
    """The task type ``clip``: any `transformers.CLIPModel`.

    Samples are mappings with ``pixel_values`` [n, 3, H, W], as the model's image processor makes them,
    ``text_embeds`` [C, P], the unit-length embeddings of the classes (see `zero_shot_head`), and for
    evaluation ``labels`` [n].
    """

    name = "clip"
    tower = "vision_model"
    blocks = "encoder.layers"
    prefixes: tuple[str, ...] = ("vision_model.",)
    config_part = "vision_config"
    layer_sets: Mapping[str, tuple[str, ...]] = {
        "full": (*_ATTENTION, "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
        "light": (*_ATTENTION, "mlp.fc1"),
        "nufilt": (*_ATTENTION, "self_attn.out_proj", "mlp.fc1"),
        "attention": (*_ATTENTION, "self_attn.out_proj"),
        "mlp": ("mlp.fc1", "mlp.fc2"),
    }

    def classes(self) -> tuple[type[Any], type[Any]]:
        from transformers import CLIPConfig, CLIPModel

        return CLIPModel, CLIPConfig

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
                {"pixel_values": given["pixel_values"]},
                {"text_embeds": given["text_embeds"]},
                given.get("labels"),
            )
        pixels, head = given.select(slice(0, 1)).inputs["pixel_values"], given.shared["text_embeds"]
        if pixels.dim() != 4 or head.dim() != 2:
            raise ValueError(
                f"pixel_values {list(pixels.shape)} and text_embeds {list(head.shape)}: "
                "expected [n, 3, H, W] and [C, P]"
            )
        _check_head(head, [f"class {row}" for row in range(len(head))])
        if given.labels is not None:
            if given.labels.shape != (len(given),):
                raise ValueError(f"labels {list(given.labels.shape)}: expected [{len(given)}], one per image")
            wrong = ((given.labels < 0) | (given.labels >= len(head))).nonzero().flatten().tolist()
            if wrong:
                label = given.labels[wrong[0]].item()
                raise ValueError(f"labels: {label} at row {wrong[0]}, and there are {len(head)} classes")
        return given

    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        """exp(s) · cos(image, text) [n, C], with the model's own logit scale s."""
        clip: Any = model
        pooled = clip.vision_model(
            pixel_values=data.inputs["pixel_values"].to(clip.logit_scale.device)
        ).pooler_output
        image = F.normalize(clip.visual_projection(pooled), dim=-1)
        return clip.logit_scale.exp() * image @ data.shared["text_embeds"].to(image).mT

    def reduce_for(self, layer: str, reduce: str) -> str:
        """`reduce` itself, in all layers."""
        return reduce

    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """The samples as they are: images need nothing more."""
        return seeds

    def valid(self, data: TaskData) -> None:
        """None: an image has one answer."""

    def outcomes(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        """Top-1 right or wrong, [n]."""
        if data.labels is None:
            raise ValueError("these samples have no labels to compare with")
        return (self.logits(model, data).argmax(-1).cpu() == data.labels.cpu()).double()


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
        pooled = model.text_model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).pooler_output
        embeddings.append(F.normalize(model.text_projection(pooled), dim=-1))
    head = F.normalize(torch.stack(embeddings).mean(0), dim=-1)
    _check_head(head, [f"class {name!r}" for name in class_names])
    return head


def prompt_tokens(
    config: Any, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]
) -> list[Mapping[str, torch.Tensor]]:
    """The tokens of all classes' prompts: ``input_ids`` and ``attention_mask`` [C, L] for each template.

    Prompts are cut to as many tokens as the text tower takes.

    Args:
        config: the `transformers.CLIPConfig` of the model.
        tokenizer, class_names, templates: see `zero_shot_head`.

    Raises:
        ValueError: a vocabulary that knows no part of any prompt; a token without an embedding; an end token
            other than the model's; two classes whose prompts are the same tokens.
    """
    text, where = config.text_config, tokenizer.name_or_path or "tokenizer"
    length = int(min(tokenizer.model_max_length, text.max_position_embeddings))
    encoded = [
        tokenizer(
            [template.format(name) for name in class_names],
            padding=True,
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
    if text.eos_token_id != 2 and not all(
        bool((tokens["input_ids"] == text.eos_token_id).any(1).all()) for tokens in encoded
    ):
        raise ValueError(
            f"{where}: prompts end with the token {tokenizer.eos_token_id}, and the eos_token_id of the text "
            f"tower is {text.eos_token_id}"
        )
    first: dict[tuple[Any, ...], str] = {}
    for row, name in enumerate(class_names):
        prompts = tuple(
            tuple(tokens["input_ids"][row][tokens["attention_mask"][row].bool()].tolist())
            for tokens in encoded
        )
        if prompts in first:
            raise ValueError(
                f"{where}: the classes {first[prompts]!r} and {name!r} are the same tokens in every prompt"
            )
        first[prompts] = name
    return encoded


def _check_head(head: torch.Tensor, names: Sequence[str]) -> None:
    """Raise `ValueError` for class embeddings [C, P] that are not finite, or equal in two rows."""
    broken = (~head.isfinite()).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"text_embeds of {names[broken[0]]}: not finite")
    _, group, counts = torch.unique(head.float(), dim=0, return_inverse=True, return_counts=True)
    if (counts > 1).any():
        equal = (group == counts.argmax()).nonzero().flatten().tolist()
        raise ValueError(
            f"text_embeds of {names[equal[0]]} and {names[equal[1]]} are equal: nothing could tell these "
            f"classes apart ({len(equal)} of {len(head)} are the same)"
        )


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
