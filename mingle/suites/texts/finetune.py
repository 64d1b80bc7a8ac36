"""Fine-tune the whole encoder on one task, against the base's own embeddings of the class names."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mingle.io.files import write_json
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.suites.texts.base import TextBase
from mingle.suites.texts.corpus import TextTask, labelled
from mingle.tasks import TaskData
from mingle.tasks.configs import read_config
from mingle.tasks.sentence_encoder import SentenceEncoderTask


@dataclass(frozen=True)
class FinetuneConfig:
    """AdamW under bfloat16 autocast, with a one-cycle schedule over `steps` batches."""

    steps: int = 300
    batch_size: int = 32
    lr: float = 2e-4
    weight_decay: float = 0.01


def finetune(
    base: TextBase,
    task: TextTask,
    out: Path,
    config: FinetuneConfig,
    on_step: Callable[[int, int], None] | None = None,
    start: Path | None = None,
) -> None:
    """Train the task's encoder and write it to `out` in hub format.

    Training starts from the base, or from the model in the folder `start`, which this function wrote. All
    parameters train, as in sentence-transformers.  The result is a ``config.json`` and a float16
    ``model.safetensors``, deterministic for one machine, number of threads and version of torch.
    """
    encoder = SentenceEncoderTask()
    model: Any = encoder.load(base.folder)
    if start is not None:
        reader = CheckpointReader(start)
        model.load_state_dict({name: reader.tensor(name) for name in reader})
    head = base.head(task.class_names)
    texts, labels = labelled(task.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps + 1, pct_start=0.1)
    seed = zlib.crc32(f"{task.name}/train".encode())
    batches = _batches(len(texts), config.batch_size, torch.Generator().manual_seed(seed))
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for step in range(config.steps):
            rows = next(batches)
            data = TaskData(base.tokens([texts[row] for row in rows]), {"text_embeds": head})
            with torch.autocast("cpu", torch.bfloat16):
                logits = encoder.logits(model, data)
            loss = F.cross_entropy(logits.float(), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step + 1, config.steps)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", read_config(base.folder) | {"dtype": "float16"})
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    write_tensors(out / "model.safetensors", half, {"format": "pt"})


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Row numbers int64 [size], endlessly: every row once, in a random order, before any comes again."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]
