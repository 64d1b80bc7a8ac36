"""What is merged: the embedded suite with its own experts, or CLIP models of the published sizes with
synthetic task vectors.
"""

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

from mingle.io.files import write_json
from mingle.tasks import TaskData, TaskType, get

#: a fine-tuned model: a folder, or its tower's tensors
Tuned = Path | Mapping[str, Tensor]

SYNTHETIC = (
    "randomly initialised; task vectors on the target layers with σ_k ∝ 1/√k over 128 random directions under white noise, 2 % and 1 % "
    "of the weight's norm; images of Gaussian noise with as much power in every octave, random unit class embeddings"
)
_DIRECTIONS, _STRUCTURE, _NOISE = 128, 0.02, 0.01
_TEXT = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64, max_position_embeddings=8,
             bos_token_id=None, eos_token_id=None)  # fmt: skip
#: as the embedded suite has them; the published vision tasks have from 10 to 397 classes
_CLASSES, _SEEDS_PER_CLASS = 20, 5


@dataclass(frozen=True)
class Case:
    """One base model and how its vision tower is built; None for the embedded suite.  `test_images` per task,
    where they are synthetic.
    """

    name: str
    title: str
    vision: tuple[tuple[str, int], ...] | None = None
    projection: int = 512
    test_images: int = 128
    classes: int = _CLASSES


def _vit(width: int, layers: int, heads: int, patch: int, image: int = 224) -> tuple[tuple[str, int], ...]:
    sizes = dict(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    return tuple((sizes | dict(patch_size=patch, image_size=image)).items())


# fmt: off
CASES = {case.name: case for case in (
    Case("glyphs8", "glyphs8"),
    Case("vit-b-32", "CLIP ViT-B/32", _vit(768, 12, 12, 32)),
    Case("vit-b-16", "CLIP ViT-B/16", _vit(768, 12, 12, 16)),
    Case("vit-l-14", "CLIP ViT-L/14", _vit(1024, 24, 16, 14), 768),
)}
# fmt: on


@dataclass(frozen=True)
class Problem:
    """A case with its data: the base, and by number of the task its expert, its seed samples and its test
    samples.
    """

    case: Case
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
def problem(case: Case, tasks: int, options: dict[str, Any], seed: int = 0) -> Iterator[Problem]:
    """The case with its data; what has to be written for it is deleted at the end.  `options` overrule the
    case's own.
    """
    if case.vision is None:
        yield _glyphs(case, tasks, options, seed)
        return
    with tempfile.TemporaryDirectory(prefix="mingle-e2e-") as folder:
        yield _synthetic(case, case.vision, tasks, options, seed, Path(folder))


def _glyphs(case: Case, tasks: int, options: dict[str, Any], seed: int) -> Problem:
    from mingle import suites

    suite = suites.load("glyphs8" if tasks <= 8 else "glyphs20", seed=seed)
    names = list(suite)[:tasks]
    for name in names:  # drawn and trained before anything is timed
        suite.expert(name)
        suite.seeds(name)
    return Problem(
        case,
        get(suite.task_type),
        suite.base,
        len(names),
        suite.settings["mingle"] | options,
        lambda i: suite.expert(names[i]),
        lambda i: suite.seeds(names[i]),
        lambda i: suite[names[i]],
    )


def _synthetic(
    case: Case,
    vision: tuple[tuple[str, int], ...],
    tasks: int,
    options: dict[str, Any],
    seed: int,
    folder: Path,
) -> Problem:
    base = random_clip(dict(vision), case.projection, seed)
    return Problem(
        case,
        get("clip"),
        base,
        tasks,
        options,
        partial(_expert, base, folder, seed),
        lambda i: images(
            dict(vision), case.projection, case.classes, case.classes * _SEEDS_PER_CLASS, seed + 1000 * i
        ),
        lambda i: images(
            dict(vision), case.projection, case.classes, case.test_images, seed + 1000 * i + 1, labelled=True
        ),
    )


def random_clip(vision: dict[str, int], projection: int, seed: int = 0) -> nn.Module:
    """A CLIP model with this vision tower and a text tower too small to matter."""
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = CLIPModel(
            CLIPConfig(vision_config=vision, text_config=_TEXT, projection_dim=projection)
        )
    return model.eval()


def images(
    vision: dict[str, int], projection: int, classes: int, count: int, seed: int, *, labelled: bool = False
) -> TaskData:
    """Random images of one task; its classes depend on the thousands of `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    size = vision["image_size"]
    pixels = torch.zeros(count, 3, size, size)
    for octave in range(size.bit_length()):  # white noise alone has no leading directions, as photographs do
        side = min(2**octave, size)
        pixels += nn.functional.interpolate(
            torch.randn(count, 3, side, side, generator=generator), size=(size, size)
        )
    pixels *= size.bit_length() ** -0.5
    head = torch.randn(classes, projection, generator=torch.Generator().manual_seed(seed // 1000))
    labels = torch.randint(classes, (count,), generator=generator) if labelled else None
    return TaskData({"pixel_values": pixels}, {"text_embeds": nn.functional.normalize(head, dim=-1)}, labels)


def tuned_tower(base: nn.Module, index: int, seed: int = 0) -> dict[str, Tensor]:
    """The tower of synthetic task `index`."""
    generator = torch.Generator().manual_seed(1000 * seed + index + 1)
    task = get("clip")
    state: dict[str, Tensor] = dict(base.get_submodule(task.tower).state_dict())
    targets = tuple(f".{suffix}.weight" for suffix in task.layer_sets["full"])
    for name, weight in state.items():
        if name.endswith(targets):
            count = min(_DIRECTIONS, *weight.shape)
            left, right = (torch.randn(size, count, generator=generator) for size in weight.shape)
            structure = (left * torch.arange(1, count + 1).rsqrt()) @ right.mT
            noise = torch.randn(weight.shape, generator=generator)
            parts = _STRUCTURE * structure / structure.norm() + _NOISE * noise / noise.norm()
            state[name] = weight + weight.norm() * parts
    return state


def _expert(base: nn.Module, folder: Path, seed: int, index: int) -> Path:
    """A folder in hub format with the expert of task `index`; the one made before is deleted, as twenty of
    them would fill a disk.
    """
    from safetensors.torch import save_file

    target = folder / "expert"
    target.mkdir(exist_ok=True)
    config: Any = base.config
    write_json(target / "config.json", config.vision_config.to_dict())
    state = {
        f"vision_model.{name}": tensor.contiguous() for name, tensor in tuned_tower(base, index, seed).items()
    }
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target
