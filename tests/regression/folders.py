"""Two small folders that version 0.1.0 saved, and what becomes of each when it is loaded and when a third
task is added.

python tests/regression/folders.py FOLDER    saves them with the installed version
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from figures import digest, processor, steady
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

import mingle
from mingle.tasks import TaskData

#: name → the arguments of its `mingle.Merger`
KINDS: dict[str, dict[str, Any]] = {
    "clip-mingle": dict(method="mingle", rank=2, steps=3, lr=5e-3, batch_size=4, backend="grouped"),
    "t5-opcm": dict(method="opcm"),
}
DIGESTS = "digests.json"


def base_model(kind: str) -> torch.nn.Module:
    if kind.startswith("clip"):
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        vision, text = (
            sizes | dict(image_size=8, patch_size=4),
            sizes | dict(vocab_size=8, max_position_embeddings=4),
        )
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    config = T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tuned(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A model near the base: its matrices have moved."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def samples(kind: str, seed: int) -> TaskData | None:
    """Images and classes; nothing for a method that looks at none."""
    if not kind.startswith("clip"):
        return None
    generator = torch.Generator().manual_seed(seed)
    classes = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=-1)
    return TaskData({"pixel_values": torch.randn(6, 3, 8, 8, generator=generator)}, {"text_embeds": classes})


def add(kind: str, merger: mingle.Merger, i: int) -> None:
    model = tuned(merger.base, i)
    merger.add(f"task {i}", model.vision_model if kind.startswith("clip") else model, samples(kind, i))


def states(kind: str, merger: mingle.Merger) -> dict[str, dict[str, Tensor]]:
    """The model as it was loaded, and with a third task."""
    loaded = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    add(kind, merger, 2)
    return {"loaded": loaded, "extended": merger.model.state_dict()}


def main(target: Path) -> None:
    recorded: dict[str, Any] = {"processor": processor(), "folders": {}}
    for kind, arguments in KINDS.items():
        with steady():
            merger = mingle.Merger(base_model(kind), **arguments)
            for i in range(2):
                add(kind, merger, i)
            merger.save_pretrained(target / kind)
            recorded["folders"][kind] = {name: digest(state) for name, state in states(kind, merger).items()}
    (target / DIGESTS).write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
