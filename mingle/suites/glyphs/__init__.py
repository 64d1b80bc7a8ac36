"""The embedded suites: recognise printed characters in unseen type faces and foreign visual domains.

A small CLIP, pre-trained on some six hundred characters and their Unicode names, is the base; each of the
four, eight or twenty tasks is an alphabet seen in a domain (inverted, on a chessboard, in noise, …).  The
base and the experts of `glyphs8` ship with the package.  Further experts, and chains of models each
fine-tuned from the one before, are trained on first use into the user's cache, in about 40 seconds each.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle.kernels import store
from mingle.suites import OnTraining, Suite
from mingle.suites.clip_base import ClipBase
from mingle.suites.glyphs import finetune
from mingle.suites.glyphs.alphabets import TEMPLATES
from mingle.suites.glyphs.corruptions import CORRUPTIONS, corrupt
from mingle.suites.glyphs.tasks import SUITES, TRAIN_FACES, TUNING_TASKS, GlyphTask
from mingle.suites.protocol import Labels, SeedRequest
from mingle.suites.trained import trained
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"
TEST_IMAGES_PER_CLASS = 25
TRAINING_IMAGES_PER_CLASS = 50

_MINGLES = ("mingle", "mingle-light", "mingle-routed")
#: Chosen by ``examples/glyph_models/tuning.py`` on the tuning tasks, which no other suite contains; the
#: published settings are for larger models.  ``routed`` has the rank of ``mingle``.
SETTINGS: dict[str, dict[str, Any]] = {
    "task-arithmetic": {"scaling": 0.1},
    "ties": {"scaling": 0.1},
    "magmax": {"scaling": 0.3},
    "opcm": {"alpha": 0.7},
    "wudi": {"scaling": 0.5},
    "nufilt": {"r_p": 64},
    **{name: {"rank": 32, "lr": 4e-3, "gamma": 0.1} for name in _MINGLES},
    "mingle-seq": {"rank": 32, "lr": 4e-3},
    "made-it": {"share": 0.4},
    "mass": {"depth": 0, "most": 2},
    "routed": {"rank": 32},
}

_TASKS: dict[str, tuple[GlyphTask, ...]] = {**SUITES, "glyphs-tuning": TUNING_TASKS}
#: suite → (its tasks, the corruptions of its test images)
_VARIANTS: dict[str, tuple[tuple[GlyphTask, ...], tuple[str, ...]]] = {
    **{name: (tasks, ()) for name, tasks in _TASKS.items()},
    "glyphs4-corrupted": (SUITES["glyphs4"], tuple(CORRUPTIONS)),
    **{f"glyphs4-{name}": (SUITES["glyphs4"], (name,)) for name in CORRUPTIONS},
}
NAMES = tuple(_VARIANTS)


def load(name: str, base: Path | None, request: SeedRequest, on_training: OnTraining | None = None) -> Suite:
    """A glyph suite by name; see `mingle.suites.load`."""
    tasks, corruptions = _VARIANTS[name]
    base = base or BASE
    prepared = ClipBase(base)
    return Suite(
        name,
        "clip",
        base,
        {task.name: partial(_samples, task, corruptions, base) for task in tasks},
        {task.name: partial(expert_folder, task, on_training) for task in tasks},
        request,
        SETTINGS,
        continued=lambda name, after: continued_folder(
            *(_named(tasks, task) for task in (*after, name)), on_training=on_training
        ),
        training={task.name: partial(_training, task, base) for task in tasks},
        labels={task.name: partial(_labels, task, corruptions) for task in tasks},
        checks={task.name: partial(prepared.check, task.class_names, TEMPLATES) for task in tasks},
    )


def _named(tasks: tuple[GlyphTask, ...], name: str) -> GlyphTask:
    return next(task for task in tasks if task.name == name)


def _labels(task: GlyphTask, corruptions: tuple[str, ...]) -> Labels:
    names = task.class_names
    return Labels(torch.arange(len(names)).repeat(TEST_IMAGES_PER_CLASS * max(1, len(corruptions))), names)


@cache
def _samples(task: GlyphTask, corruptions: tuple[str, ...], base: Path) -> TaskData:
    """All test samples of a task; corrupted ones once per corruption."""
    pictures, labels = task.test_set(TEST_IMAGES_PER_CLASS)
    if corruptions:
        pictures = torch.cat([corrupt(name, pictures) for name in corruptions])
        labels = labels.repeat(len(corruptions))
    return TaskData(
        {"pixel_values": finetune.pixels(base, pictures)},
        {"text_embeds": finetune.head(base, _model(base), task)},
        labels,
        class_names=tuple(task.class_names),
    )


@cache
def _training(task: GlyphTask, base: Path) -> TaskData:
    """Views like those that fine-tuning sees, in training faces: the same at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task.name}/training set".encode()))
    size = TRAINING_IMAGES_PER_CLASS * len(task.characters)
    pictures, _ = task.training_batch(task.outlines(TRAIN_FACES), size, generator)
    return TaskData(
        {"pixel_values": finetune.pixels(base, pictures)},
        {"text_embeds": finetune.head(base, _model(base), task)},
        class_names=tuple(task.class_names),
    )


@cache
def _model(base: Path) -> nn.Module:
    return ClipTask().load(base)


def expert_folder(task: GlyphTask, on_training: OnTraining | None = None) -> Path:
    """The folder of the task's tower: in the package, or in the user's cache, trained on demand."""
    shipped = DATA / "experts" / task.name
    return shipped if shipped.is_dir() else _trained(cache_folder() / task.name, task, None, on_training)


def continued_folder(*chain: GlyphTask, on_training: OnTraining | None = None) -> Path:
    """The folder of the last task's tower, at the end of a chain of towers that starts from the base.

    Each tower is fine-tuned from the one before.  A tower is kept by the names of all tasks of its chain, in
    order: chains that begin alike share the towers of their common beginning.
    """
    *before, task = chain
    if not before:
        return expert_folder(task, on_training)
    start = continued_folder(*before, on_training=on_training)
    order = hashlib.sha256("\n".join(earlier.name for earlier in before).encode()).hexdigest()[:12]
    return _trained(cache_folder() / f"{task.name}-after-{order}", task, start, on_training)


def _trained(cached: Path, task: GlyphTask, start: Path | None, on_training: OnTraining | None) -> Path:
    """The folder `cached`, into which the task's tower is trained if it does not exist yet."""
    on_step = partial(on_training, task.name) if on_training else None
    return trained(cached, lambda folder: finetune.finetune(BASE, task, folder, start=start, on_step=on_step))


def cache_folder() -> Path:
    """A folder in ``$MINGLE_CACHE`` or ``~/.cache/mingle``, named by the base model's content.

    Another base makes other experts.
    """
    files = json.loads((DATA / "manifest.json").read_text())["files"]
    return (
        store.cache_folder()
        / "glyphs"
        / hashlib.sha256(files["base/model.safetensors"].encode()).hexdigest()[:12]
    )
