"""What is merged: the embedded suite with its experts, or CLIPs of published sizes with synthetic ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mingle.bench.judge import Target
from mingle.io.files import write_json
from mingle.tasks import TaskData, TaskType, get

#: a fine-tuned model: a folder, or its tower's tensors
Tuned = Path | Mapping[str, Tensor]
BF16, EAGER, PUBLISHED = "mingle bf16", "eager, full SVDs", "published"
SYNTHETIC = """randomly initialised; task vectors on the target layers with σ_k ∝ 1/√k over 128 random \
directions under white noise, 2 % and 1 % of the weight's norm; images of Gaussian noise with as much \
power in every octave, random unit class embeddings"""
_DIRECTIONS, _STRUCTURE, _NOISE = 128, 0.02, 0.01
_TEXT: dict[str, int | None] = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
    max_position_embeddings=8, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
#: classes as the embedded suite has them (published tasks have from 10 to 397); seeds and tests per task
_CLASSES, _SEEDS, _TESTS = 20, 100, 128


@dataclass(frozen=True)
class MergeCase:
    """One base model and how its vision tower is built; None for the embedded suite."""

    name: str
    title: str
    vision: Mapping[str, int] | None = None
    projection: int = 512


def vit(width: int, layers: int, heads: int, patch: int, image: int = 224) -> dict[str, int]:
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
    return sizes | dict(num_attention_heads=heads, patch_size=patch, image_size=image)


CASES = {
    "glyphs8": MergeCase("glyphs8", "glyphs8"),
    "vit-b-32": MergeCase("vit-b-32", "CLIP ViT-B/32", vit(768, 12, 12, 32)),
    "vit-b-16": MergeCase("vit-b-16", "CLIP ViT-B/16", vit(768, 12, 12, 16)),
    "vit-l-14": MergeCase("vit-l-14", "CLIP ViT-L/14", vit(1024, 24, 16, 14), 768),
}
_EIGHT = ("glyphs8, 8 tasks", "vit-b-32, 8 tasks")
TARGETS = (
    *(Target(case, PUBLISHED, 3.0, device="cpu") for case in _EIGHT),
    *(Target(case, PUBLISHED, 2.5, stage="adapt", device="cpu") for case in _EIGHT),
    *(Target(case, PUBLISHED, 4.0, BF16, stage="adapt", device="cpu") for case in _EIGHT),
    *(Target(case, PUBLISHED, 20.0, device="cuda") for case in ("vit-b-32, 8 tasks", "vit-l-14, 20 tasks")),
)


@dataclass(frozen=True)
class MergeProblem:
    """A case with its data: the base, and by number of the task its expert, seed samples and test samples."""

    case: MergeCase
    task: TaskType
    base: nn.Module | Path
    tasks: int
    options: dict[str, Any]
    expert: Callable[[int], Tuned]
    seeds: Callable[[int], TaskData]
    tests: Callable[[int], TaskData]

    def module(self) -> nn.Module:
        return self.base if isinstance(self.base, nn.Module) else self.task.load(self.base)


@contextmanager
def problem(case: MergeCase, tasks: int, options: dict[str, Any], seed: int = 0) -> Iterator[MergeProblem]:
    """The case with its data; what is written for it is deleted at the end.  `options` overrule its own."""
    if case.vision is None:
        yield _glyphs(case, tasks, options, seed)
        return
    with tempfile.TemporaryDirectory(prefix="mingle-e2e-") as folder:
        base = random_clip(case.vision, case.projection, seed)
        yield synthetic(case, base, tasks, options, partial(_expert, base, Path(folder), seed), seed)


def _glyphs(case: MergeCase, tasks: int, options: dict[str, Any], seed: int) -> MergeProblem:
    from mingle import suites

    suite = suites.load("glyphs8" if tasks <= 8 else "glyphs20", seed=seed)
    names = list(suite)[:tasks]
    for name in names:  # drawn and trained before anything is timed
        suite.expert(name)
        suite.seeds(name)
    own = suite.settings["mingle"] | options
    parts = (lambda i: suite.expert(names[i])), (lambda i: suite.seeds(names[i])), (lambda i: suite[names[i]])
    return MergeProblem(case, get(suite.task_type), suite.base, len(names), own, *parts)


def synthetic(
    case: MergeCase, base: nn.Module, tasks: int, options: dict[str, Any], expert: Callable[[int], Tuned],
    seed: int, classes: int = _CLASSES, seeds: int = _SEEDS,
) -> MergeProblem:  # fmt: skip
    """Random images for a case with a vision tower of its own."""
    assert case.vision is not None
    draw = partial(images, case.vision["image_size"], case.projection, classes)
    return MergeProblem(
        case, get("clip"), base, tasks, options, expert,
        seeds=lambda i: draw(seeds, seed + 1000 * i),
        tests=lambda i: draw(_TESTS, seed + 1000 * i + 1, labelled=True),
    )  # fmt: skip


def random_clip(vision: Mapping[str, int], projection: int, seed: int = 0) -> nn.Module:
    """A CLIP model with this vision tower and a text tower too small to matter."""
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = CLIPConfig(vision_config=dict(vision), text_config=_TEXT, projection_dim=projection)
        model: nn.Module = CLIPModel(config)
    return model.eval()


def images(
    size: int, projection: int, classes: int, count: int, seed: int, *, labelled: bool = False
) -> TaskData:
    """Random images of one task; its classes depend on the thousands of `seed` alone."""
    generator, pixels = torch.Generator().manual_seed(seed), torch.zeros(count, 3, size, size)
    for octave in range(size.bit_length()):  # white noise alone has no leading directions, as photographs do
        side = min(2**octave, size)
        noise = torch.randn(count, 3, side, side, generator=generator)
        pixels += nn.functional.interpolate(noise, size=(size, size))
    pixels *= size.bit_length() ** -0.5
    head = torch.randn(classes, projection, generator=torch.Generator().manual_seed(seed // 1000))
    labels = torch.randint(classes, (count,), generator=generator) if labelled else None
    return TaskData({"pixel_values": pixels}, {"text_embeds": nn.functional.normalize(head, dim=-1)}, labels)


def tuned_tower(base: nn.Module, index: int, seed: int = 0) -> dict[str, Tensor]:
    """The tower of synthetic task `index`."""
    generator, task = torch.Generator().manual_seed(1000 * seed + index + 1), get("clip")
    state: dict[str, Tensor] = dict(base.get_submodule(task.tower(base)).state_dict())
    targets = tuple(f".{suffix}.weight" for suffix in task.structure(base).sets["full"])
    for name, weight in [item for item in state.items() if item[0].endswith(targets)]:
        count = min(_DIRECTIONS, *weight.shape)
        left, right = (torch.randn(size, count, generator=generator) for size in weight.shape)
        structure = (left * torch.arange(1, count + 1).rsqrt()) @ right.mT
        noise = torch.randn(weight.shape, generator=generator)
        parts = _STRUCTURE * structure / structure.norm() + _NOISE * noise / noise.norm()
        state[name] = weight + weight.norm() * parts
    return state


def _expert(base: nn.Module, folder: Path, seed: int, index: int) -> Path:
    """A hub folder with the expert of a task, in the place of the one before: twenty would fill a disk."""
    from safetensors.torch import save_file

    target, config = folder / "expert", getattr(base, "config")  # noqa: B009
    target.mkdir(exist_ok=True)
    write_json(target / "config.json", config.vision_config.to_dict())
    tower = {f"vision_model.{k}": tensor.contiguous() for k, tensor in tuned_tower(base, index, seed).items()}
    save_file(tower, target / "model.safetensors", {"format": "pt"})
    return target
