"""Tiny models of the architectures that people merge, samples for them, and fine-tuned copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from mingle.methods import METHODS
from mingle.tasks import TaskType

VOCABULARY, WIDTH = 64, 16
_DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=48,
)
_ENCODER = {name: value for name, value in _DECODER.items() if name != "num_key_value_heads"}
_VISION = dict(
    hidden_size=WIDTH,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
_TEXT = _ENCODER | dict(max_position_embeddings=16)
_PADDED = dict(pad_token_id=0)


def _decoder(config: str, **more: object) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**_DECODER | more)
    )


def _made(model: str, config: str, **settings: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


#: by the name that transformers has for each kind
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("LlamaConfig"),
    "qwen2": _decoder("Qwen2Config"),
    "qwen3": _decoder("Qwen3Config", head_dim=8),
    "mistral": _decoder("MistralConfig"),
    "gemma2": _decoder("Gemma2Config", head_dim=8),
    "gemma3": _decoder("Gemma3TextConfig", head_dim=8),
    "phi3": _decoder("Phi3Config", **_PADDED),
    "gpt2": _made(
        "GPT2LMHeadModel", "GPT2Config",
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=48,
    ),
    "gpt_neox": _decoder("GPTNeoXConfig"),
    "olmo2": _decoder("Olmo2Config", **_PADDED),
    "mixtral": _decoder("MixtralConfig", num_local_experts=3),
    "qwen3_moe": _decoder(
        "Qwen3MoeConfig", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    ),
    "vit": _made("ViTForImageClassification", "ViTConfig", **_VISION),
    "dinov2": _made("Dinov2ForImageClassification", "Dinov2Config", **_VISION),
    "swin": _made(
        "SwinForImageClassification", "SwinConfig",
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4,
    ),
    "bert": _made("BertForSequenceClassification", "BertConfig", **_ENCODER),
    "roberta": _made("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER),
    "deberta-v2": _made("DebertaV2ForSequenceClassification", "DebertaV2Config", **_ENCODER),
    "distilbert": _made(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=24, n_layers=2, n_heads=2,
    ),
    "clip": _made("CLIPModel", "CLIPConfig", text_config=_TEXT, vision_config=_VISION, projection_dim=WIDTH),
    "siglip": _made("SiglipModel", "SiglipConfig", text_config=_TEXT, vision_config=_VISION),
    "t5": _made(
        "T5ForConditionalGeneration", "T5Config",
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    ),
    "mt5": _made(
        "MT5ForConditionalGeneration", "MT5Config",
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
    ),
    "bart": _made(
        "BartForConditionalGeneration", "BartConfig",
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=48,
    ),
}  # fmt: skip

#: what is found in one of them is new: Conv1D, fused products, packed experts, two towers, cross-attention
UNLIKE = ("gpt2", "phi3", "mixtral", "gpt_neox", "vit", "deberta-v2", "clip", "t5")
#: these have the blocks of llama, mixtral, vit, bert, clip or t5 with other names, norms or sizes
ALIKE = (
    "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "qwen3_moe",
    "dinov2", "roberta", "distilbert", "siglip", "mt5",
)  # fmt: skip

#: the test runs for each kind, slow where another in the plain run has the like
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in UNLIKE)) for kind in ARCHITECTURES]
)


def built(name: str) -> nn.Module:
    """The model of that name, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES[name]().eval()


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A fine-tuned copy."""
    generator, tuned = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return tuned


def samples(
    task: TaskType, model: nn.Module, n: int = 4, *, labelled: bool = False
) -> dict[str, torch.Tensor]:
    """Four random samples of a model's task type, some of them with padding."""
    generator, n = torch.Generator().manual_seed(1), 4
    config = model.config
    if task.name in ("clip", "image-classification"):
        size = getattr(config, "vision_config", config).image_size
        given = {"pixel_values": torch.randn(n, 3, size, size, generator=generator)}
    else:
        ids = torch.randint(3, VOCABULARY, (n, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[: n // 2, 4:] = 0
        given = {"input_ids": ids * mask, "attention_mask": mask}
    if task.name in ("clip", "sentence-encoder"):
        heads = torch.randn(3, WIDTH, generator=generator)
        given["text_embeds"] = nn.functional.normalize(heads, dim=-1)
    if labelled:
        answers = task.name in ("seq2seq", "causal-lm")
        shape = (n, 3) if answers else (n,)
        given["labels"] = (
            torch.randint(3, VOCABULARY, shape, generator=generator) if answers else torch.arange(n) % 2
        )
    return given


#: options that make a method fast, each for the methods that have it
CHEAP = dict(rank=2, later_rank=2, steps=2, lr=1e-2, batch_size=4, r_p=4, r_v=2, r_l=2, depths=(0, 1), k=1)


def options(method: str) -> dict[str, Any]:
    """Options with which a method merges these models in a moment."""
    return {name: CHEAP[name] for name in CHEAP if name in METHODS[method].Options.__dataclass_fields__}


def names_in(folder: Path) -> set[str]:
    """The tensors in the file of a folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
