"""Zero-shot image classification with CLIP: a fine-tuned vision tower, and the base's text tower as head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mingle.tasks import TaskData
from mingle.tasks.loading import HubModel

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
            ValueError: a missing key, or shapes that do not fit; the message names the key.
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
        if given.labels is not None and len(given.labels) != len(given):
            raise ValueError(f"{len(given.labels)} labels for {len(given)} images")
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
    """
    device = model.logit_scale.device
    embeddings = []
    for template in templates:
        tokens = tokenizer(
            [template.format(name) for name in class_names],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        pooled = model.text_model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).pooler_output
        embeddings.append(F.normalize(model.text_projection(pooled), dim=-1))
    return F.normalize(torch.stack(embeddings).mean(0), dim=-1)


def processor_pixels(folder: str | Path, images: Sequence[Any]) -> torch.Tensor:
    """Images through the image processor of a local hub folder: float32 [n, 3, H, W].

    Args:
        folder: holds the processor's configuration.
        images: PIL images, or uint8 arrays [3, H, W].
    """
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    pixels: torch.Tensor = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return pixels
