"""How much memory twenty tasks of a ViT-L/14 take in one process, whole or with models left in their files.

The base and two fine-tuned models, which take turns, are random.  Gates adapt for one step to few random
images: what a merge computes with grows with these, and what it holds does not.

    python examples/studies/vit_large.py FILE.json --work FOLDER --kind files
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from mingle.io.files import write_json
from mingle.io.provenance import describe
from mingle.merging.merger import Merger
from mingle.merging.sharded import ShardedMerger

TOWER = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, patch_size=14)
_TEXTS = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
_MODELS = ("one", "two")
_KINDS = {"whole": Merger, "files": ShardedMerger}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/vit_large"), help="where models are made")
    parser.add_argument("--kind", choices=_KINDS, default="files", help="of merger")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--images", type=int, default=1, help="of each task")
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    if not (args.work / _MODELS[-1]).exists():
        make(args.work, args.layers)
        raise SystemExit(f"{args.work}: models are made; start again to measure, in a process without them")
    rows = []
    for row in measured(args.kind, args.work, args.tasks, args.images):
        rows.append(row)
        print(row, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"kind": args.kind, "layers": args.layers, "images": args.images}
    write_json(args.out, {**settings, "tasks": rows, **describe(torch.device("cpu"))})


def make(work: Path, layers: int) -> None:
    """Write the base and the fine-tuned models."""
    torch.manual_seed(0)
    tower = {**TOWER, "num_hidden_layers": layers, "projection_dim": 768}
    model = CLIPModel(CLIPConfig(vision_config=tower, text_config=_TEXTS, projection_dim=768))
    model.save_pretrained(work / "base")
    for name in _MODELS:
        with torch.no_grad():
            for weight in model.vision_model.parameters():
                if weight.dim() == 2:
                    weight += 1e-3 * torch.randn(len(weight), 64) @ torch.randn(64, weight.shape[1])
        model.save_pretrained(work / name)


def measured(kind: str, work: Path, tasks: int, images: int) -> Iterator[dict[str, Any]]:
    """After each task, the bytes that this process has had at most, and the seconds that the task took."""
    merger = _KINDS[kind](work / "base", "mingle", rank=64, steps=1, batch_size=images)
    for number in range(tasks):
        torch.manual_seed(number)
        seeds = {"pixel_values": torch.randn(images, 3, 224, 224)}
        seeds["text_embeds"] = normalize(torch.randn(10, 768), dim=1)
        began = time.perf_counter()
        merger.add(f"task {number + 1}", work / _MODELS[number % len(_MODELS)], seeds)
        seconds = time.perf_counter() - began
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield {"task": number + 1, "peak": peak, "seconds": seconds}


if __name__ == "__main__":
    main()
