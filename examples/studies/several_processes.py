"""What several processes gain on this machine, and what they would send to each other on 8 to 512 GPUs.

    python examples/studies/several_processes.py --out bench/results/cpu/several-processes

The first part is measured: the stages of merging a small CLIP by one process of one thread and by two, and
the bytes that each gives to a sum.  A process's work is its CPU time, waiting not counted, which others on
the machine disturb least.  The second is a model: bytes by formulas, which the first part checks, and seconds
from the rates below.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CLIPConfig, CLIPModel

import mingle
from mingle import ranks
from mingle.bench.machine import LoadMeter
from mingle.io.files import write_json
from mingle.io.provenance import describe
from mingle.methods import mingle as method
from mingle.tasks import TaskData

#: of every GPU: products per second that a small batch reaches, bytes per second to others, seconds per
#: message; and the options of a merge
FLOPS, BYTES, LATENCY = 2e14, 4e10, 2e-5
RANK, STEPS, BATCH, SEEDS, SAMPLES = 64, 50, 16, 128, 20_000
GPUS = (1, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 3
STAGES = ("experts", "adaptation", "directions")


class Shape(NamedTuple):
    """A transformer: blocks, the widths of what its layers see, tokens per sample, parameters.

    Attributes:
        inputs: by distinct input of a block, its width and the widths of the outputs of the layers there.
    """

    blocks: int
    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    tokens: int
    parameters: float

    @property
    def layers(self) -> int:
        return self.blocks * sum(len(outputs) for _, outputs in self.inputs)

    def expert_bytes(self, rank: int) -> int:
        pairs = [(d, o) for d, outputs in self.inputs for o in outputs]
        return self.blocks * sum(4 * min(rank, d, o) * (d + o) for d, o in pairs)

    def gradient_bytes(self) -> int:
        """Of one step: a number per input of every gate, its bias, and the loss."""
        return 4 * (self.blocks * sum(len(outputs) * (d + 1) for d, outputs in self.inputs) + 1)

    def direction_bytes(self) -> int:
        """Of the sums Σ xᵀx in float64, one per distinct input; wider ones are sketched by 256 rows."""
        return self.blocks * sum(8 * d * (d if d < 8192 else 256) for d, _ in self.inputs)


def vit(blocks: int, d: int, tokens: int, parameters: float) -> Shape:
    return Shape(blocks, ((d, (d, d, d)), (d, (d,)), (d, (4 * d,)), (4 * d, (d,))), tokens, parameters)


LLAMA = ((3072, (3072, 1024, 1024)), (3072, (3072,)), (3072, (8192, 8192)), (8192, (3072,)))
MODELS = {
    "ViT-B/32": vit(12, 768, 50, 8.7e7),
    "ViT-L/14": vit(24, 1024, 257, 3.0e8),
    "Llama of 3 B": Shape(28, LLAMA, 256, 3.2e9),
}
#: what is measured: a CLIP of this shape, with random weights
MEASURED, SIZE = vit(2, 768, 50, 1.4e7), dict(rank=32, steps=8, batch_size=16, k=3)


def predicted(model: Shape, gpus: int) -> dict[str, float]:
    """Seconds of every stage of one arrival, of which messages, and the share of the GPUs that has work.

    Collectives are rings: a process sends 2 (N − 1)/N of what is summed, and (N − 1)/N of what is gathered.
    """
    ring, hops = (gpus - 1) / gpus, 2 * (gpus - 1)
    forward = 2 * model.parameters * model.tokens / FLOPS
    share = math.ceil(BATCH / gpus)
    step = 3 * share * forward
    reduce = 2 * ring * model.gradient_bytes() / BYTES + hops * LATENCY
    directions = math.ceil(SEEDS / gpus) * forward
    sums = 2 * ring * model.direction_bytes() / BYTES + hops * LATENCY * len(model.inputs) * model.blocks
    batches = math.ceil(SAMPLES / 128 / gpus) * 128 * forward
    experts = ring * model.expert_bytes(RANK) / BYTES + hops * LATENCY
    return {
        "gpus": gpus,
        "experts: messages": experts,
        "adaptation": STEPS * (step + reduce),
        "adaptation: messages": STEPS * reduce,
        "directions": directions + sums,
        "directions: messages": sums,
        "evaluation": batches,
        "busy in experts": min(1.0, model.layers / gpus),
        "busy in adaptation": min(1.0, BATCH / gpus),
        "busy in evaluation": min(1.0, SAMPLES / 128 / gpus),
    }


def base() -> Any:
    torch.manual_seed(0)
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12)
    text = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes = dict(vision_config=vision | dict(image_size=224, patch_size=32), projection_dim=64)
    return CLIPModel(CLIPConfig(text_config=text | dict(vocab_size=64), **sizes)).eval()


def work() -> dict[str, Any]:
    """Merge two tasks with the others: CPU and wall seconds of the second's stages, and the bytes summed."""
    torch.set_num_threads(1)
    model, generator = base(), torch.Generator().manual_seed(1)
    tower, found = model.vision_model.state_dict(), {}
    stages = {"experts": (method, "shared_experts"), "adaptation": (method, "adapt_gates")}
    for stage, (where, name) in (stages | {"directions": (method.Mingle, "_protect")}).items():
        setattr(where, name, _timed(stage, getattr(where, name), found))
    summed: list[int] = []
    ranks.sum_ = _counting(ranks.sum_, summed)
    merger = mingle.Merger(model, "mingle", **SIZE)
    for name in ("first", "second"):
        summed.clear()
        tuned = {key: t + 0.02 * torch.randn(t.shape, generator=generator) for key, t in tower.items()}
        seeds = {"pixel_values": torch.randn(32, 3, 224, 224, generator=generator)}
        classes = torch.nn.functional.normalize(torch.randn(10, 64, generator=generator), dim=-1)
        merger.add(name, tuned, TaskData(seeds, {"text_embeds": classes}))
    return found | {"bytes": summed}


def _timed(stage: str, run: Callable[..., Any], found: dict[str, Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time(), time.perf_counter()
        result = run(*args, **kwargs)
        found[stage] = {"cpu": time.process_time() - began[0], "wall": time.perf_counter() - began[1]}
        return result

    return timed


def _counting(run: Callable[..., None], summed: list[int]) -> Callable[..., None]:
    def counting(*tensors: torch.Tensor) -> None:
        summed.append(sum(tensor.nbytes for tensor in tensors))
        run(*tensors)

    return counting


def together(size: int) -> list[dict[str, Any]]:
    """What each of that many processes measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    group = [
        fork.Process(target=_member, args=(number, size, port, sender))
        for number, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(group, pipes, strict=True):
        process.start()
        sender.close()
    said = [receiver.recv() for receiver, _ in pipes]
    for process in group:
        process.join()
    return said


def _member(number: int, size: int, port: int, pipe: Any) -> None:
    """One of a group, as torchrun starts them."""
    if size > 1:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ranks.joined():
        found = work()
    pipe.send(found)


def measured(rounds: int) -> dict[str, Any]:
    """Work of one process alone over the work of the busier one of two, round by round.

    Raises:
        RuntimeError: a process failed, or summed another number of bytes than the formulas say.
    """
    found: list[dict[int, list[dict[str, Any]]]] = [
        {size: together(size) for size in (1, 2)} for _ in range(rounds)
    ]
    gradient, directions = MEASURED.gradient_bytes(), MEASURED.direction_bytes()
    for each in (own for both in found for group in both.values() for own in group):
        steps = [size for size in each["bytes"] if size == gradient]
        rest = sum(each["bytes"]) - gradient * len(steps)
        if len(steps) != SIZE["steps"] or rest not in (0, directions):
            raise RuntimeError(
                f"{each['bytes']} bytes summed; expected {gradient} per step, {directions} once"
            )
    stages = {}
    for stage in STAGES:
        seconds = {
            kind: [[max(own[stage][kind] for own in both[size]) for both in found] for size in (1, 2)]
            for kind in ("cpu", "wall")
        }
        one, two = seconds["cpu"]
        gains = [a / b for a, b in zip(one, two, strict=True)]
        stages[stage] = {"gain in work": statistics.median(gains), "gains": gains, "seconds": seconds}
    return {"stages": stages, "gradient_bytes": gradient, "direction_bytes": directions}


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["Gain in work of two processes over one, by CPU time", "", "| stage | gain |", "|---|---:|"]
    stages = results["measured"]["stages"]
    lines += [f"| {stage} | {stages[stage]['gain in work']:.2f} × |" for stage in STAGES]
    for name, shape in MODELS.items():
        rows = results["model"][name]
        kinds = [kind for kind in predicted(shape, 1) if kind != "gpus"]
        lines += ["", f"{name}: seconds per arrival, and the share of the GPUs that has work (model)", ""]
        lines += [f"| GPUs | {' | '.join(kinds)} |", "|---:" * (len(kinds) + 1) + "|"]
        lines += [f"| {row['gpus']} | {' | '.join(f'{row[kind]:.2g}' for kind in kinds)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a folder for results.json and table.md")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args(arguments)
    load = LoadMeter()
    results = describe(torch.device("cpu")) | {
        "measured": measured(args.rounds) | {"cpus_used_by_others": load.others(), "sizes": SIZE},
        "model": {name: [predicted(shape, n) for n in GPUS] for name, shape in MODELS.items()},
        "assumed": {"flops": FLOPS, "bytes_per_second": BYTES, "latency": LATENCY, "rank": RANK}
        | {"steps": STEPS, "batch": BATCH, "seeds": SEEDS, "samples": SAMPLES},
    }
    if args.out is None:
        print(table(results))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", results)
    (args.out / "table.md").write_text(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
