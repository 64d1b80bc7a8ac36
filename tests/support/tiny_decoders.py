"""Tiny language models of many architectures, and merges of them whose tasks differ in their tokens."""

from __future__ import annotations

import copy
from functools import cache

import torch
import transformers

import mingle
from mingle.methods import METHODS
from mingle.tasks.structure import is_linear

VOCABULARY = 96
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_PAIR = dict(
    vocab_size=VOCABULARY, d_model=32, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_BART = dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=8, sliding_window=5),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4),
    "mt5": lambda: transformers.MT5Config(**_PAIR, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": lambda: transformers.BartConfig(
        **_PAIR, **_BART, encoder_attention_heads=4, decoder_attention_heads=4, bos_token_id=1,
        forced_eos_token_id=None, max_position_embeddings=64,
    ),
}  # fmt: skip
PAIRS = ("mt5", "bart")
DECODERS = tuple(name for name in CONFIGS if name not in PAIRS)
#: what every method needs to be quick
QUICK = dict(rank=4, later_rank=4, steps=2, lr=0.3, batch_size=4)


def built(config: transformers.PreTrainedConfig) -> torch.nn.Module:
    """A model with random weights, whose answers differ enough between inputs, and never end."""
    auto = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{auto}").from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tuned(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with other weights in its linear layers."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for module in model.modules():
            if is_linear(module) and module is not model.get_output_embeddings():
                change = torch.randn(module.weight.shape, generator=generator)
                module.weight += 0.5 * module.weight.std() * change
    return model


def prompts(name: str, task: int, n: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of unequal lengths, padded as models of this kind are; tasks differ in their tokens."""
    longest = 9
    generator = torch.Generator().manual_seed(100 * task + seed)
    ids = torch.randint(3 + 30 * task, 33 + 30 * task, (n, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest) < lengths[:, None]).long()
    if name in DECODERS:
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def mixed(name: str, n: int = 4, seed: int = 9) -> dict[str, torch.Tensor]:
    """Prompts of two tasks in turn."""
    parts = [prompts(name, task, n // 2, seed) for task in range(2)]
    return {key: torch.stack([part[key] for part in parts], 1).flatten(0, 1) for key in parts[0]}


@cache
def merged(name: str, method: str) -> mingle.Merger:
    """A merge of two tasks; whoever uses it leaves it as it is."""
    base = built(CONFIGS[name]())
    given = QUICK | ({"abstain": None, "gates": "hard", "depths": (0, 1)} if method == "routed" else {})
    options = {key: value for key, value in given.items() if hasattr(METHODS[method].Options(), key)}
    merger = mingle.Merger(base, method, **options)
    for task in range(2):
        merger.add(f"task {task}", tuned(base, task), prompts(name, task, 32 if method == "routed" else 8))
    return merger
