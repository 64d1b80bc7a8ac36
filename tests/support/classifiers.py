"""Tiny classifiers of images and texts, and fine-tuned models with heads of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

_TEXT = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=24,
)
#: kind → a base with a head of two classes
MAKERS: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT, pad_token_id=1)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    ),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**_TEXT, pad_token_id=0)),
}
NAMES = (("cat", "dog"), ("red", "green", "blue"))


def made(kind: str) -> Any:
    """A base by its kind, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKERS[kind]().eval()


def tuned(base: nn.Module, names: tuple[str, ...], seed: int = 1, **settings: Any) -> Any:
    """The base, all its tensors moved, with a head that knows classes of these names."""
    whole: Any = base
    config = copy.deepcopy(whole.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = type(whole)(config).eval()
        model.base_model.load_state_dict(whole.base_model.state_dict())
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def inputs(base: nn.Module, count: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images, or texts of which some are shorter."""
    whole: Any = base
    generator = torch.Generator().manual_seed(seed)
    if whole.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[: count // 2, 4:] = 0
    pad = whole.config.pad_token_id or 0
    return {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
