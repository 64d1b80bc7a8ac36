"""Llama checkpoints of any size with random weights, written shard by shard: no model is ever in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mingle.io.files import write_json

#: of a task vector, the share of entries that are larger than all others of their tensor
DENSITY = 0.25
DATA = """random Llamas in bf16.  Entries of the base are normal, σ 0.02.  Of every four entries of a task \
vector one is large, from 0.010 to 0.028 and in every model in an interval of its own, and three are below \
0.005: trimming to a quarter keeps the same ones whether entries are ranked in every tensor or all together, \
and no two of them cancel"""
#: how many random entries there are, a prime and four times one; tensors repeat them, each from its place
_ENTRIES, _CHANGES = 4_194_301, 4 * 1_048_573
_SCALE, _TOKENS, _HEAD = 0.02, 32_000, 64


@dataclass(frozen=True)
class Size:
    """Width, blocks, width between, and key-value heads of a Llama with 32,000 tokens and heads of 64."""

    width: int
    blocks: int
    inner: int
    kv_heads: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's, by name, in the order of the files."""
        d, inner, outputs = self.width, self.inner, {"q": self.width, "o": self.width}
        outputs |= dict.fromkeys("kv", _HEAD * self.kv_heads)
        block: dict[str, tuple[int, ...]] = {f"self_attn.{k}_proj": (n, d) for k, n in outputs.items()}
        block |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
        block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (d,))
        blocks = {f"model.layers.{i}.{k}.weight": s for i in range(self.blocks) for k, s in block.items()}
        ends = (_TOKENS, d)
        return {
            "model.embed_tokens.weight": ends,
            **blocks,
            "model.norm.weight": (d,),
            "lm_head.weight": ends,
        }

    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
        heads = dict(num_attention_heads=self.width // _HEAD, num_key_value_heads=self.kv_heads)
        sizes = dict(hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.blocks)
        return kind | heads | sizes | {"vocab_size": _TOKENS, "tie_word_embeddings": False}


#: by thousand millions of parameters
SIZES = {
    "0.06 B": Size(512, 8, 2048, 4),
    "0.1 B": Size(640, 12, 2560, 5),
    "0.15 B": Size(768, 12, 3072, 4),
    "0.3 B": Size(1024, 16, 4096, 4),
    "0.6 B": Size(1536, 20, 4096, 6),
    "1.1 B": Size(2048, 16, 8192, 8),
    "3.0 B": Size(3072, 28, 8192, 12),
}


def write(folder: Path, size: Size, tuned: int | None = None, shard_bytes: int = 1 << 29) -> Path:
    """Write the base, or fine-tuned model number `tuned` of it, from 0 to 7, in the hub's layout.

    No more than one shard and one tensor is in memory.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", size.config())
    base, change = _base(), None if tuned is None else _change(tuned)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for number, (name, shape) in enumerate(size.shapes().items()):
        tensor = _taken(base, 7919 * number, shape)
        shard[name] = tensor if change is None else (tensor + _taken(change, 4 * 7907 * number, shape))
        shard[name] = shard[name].bfloat16()
        if name == "lm_head.weight" or sum(one.nbytes for one in shard.values()) >= shard_bytes:
            file = f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return folder


def _base() -> Tensor:
    return (_SCALE * torch.randn(_ENTRIES, generator=torch.Generator().manual_seed(0))).bfloat16().float()


def _change(model: int) -> Tensor:
    generator = torch.Generator().manual_seed(model + 1)
    draw = partial(torch.rand, generator=generator)
    sizes = 0.25 * draw(_CHANGES // 4, 4)
    large = torch.randint(4, (_CHANGES // 4, 1), generator=generator)
    sizes.scatter_(1, large, 0.5 + 0.12 * model + 0.06 * draw(_CHANGES // 4, 1))
    return (_SCALE * sizes * (draw(_CHANGES // 4, 4) - 0.5).sign()).flatten()


def _taken(entries: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape filled with the entries in turn, from `start` on."""
    start, count = start % len(entries), torch.Size(shape).numel()
    repeated = entries.repeat(1 + (start + count - 1) // len(entries))
    return repeated[start : start + count].reshape(shape)
