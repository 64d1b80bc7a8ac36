"""The embedded suite: recognise printed characters in unseen type faces, eight or twenty tasks in foreign visual domains.

A small CLIP, pre-trained on some six hundred characters and their Unicode names, is the base; each task is an alphabet seen in a domain
(inverted, on a chessboard, in noise, …).  The base and the experts of `glyphs8` ship with the package; further experts are trained on
first use into the user's cache, about 40 seconds each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from mingle.kernels import store
from mingle.suites import OnTraining, Suite
from mingle.suites.glyphs import finetune
from mingle.suites.glyphs.corruptions import CORRUPTIONS, corrupt
from mingle.suites.glyphs.tasks import SUITES, TUNING_TASKS, GlyphTask
from mingle.suites.protocol import SeedRequest
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"
TEST_IMAGES_PER_CLASS = 25

#: Chosen on the tuning tasks, which are in no suite, by ``bench/glyphs/sweep.py tuning``; the paper's 64 and 1e-4 are for larger models.
SETTINGS = {"rank": 32, "lr": 4e-3}

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
    return Suite(
        name,
        "clip",
        base,
        {task.name: partial(_samples, task, corruptions, base) for task in tasks},
        {task.name: partial(expert_folder, task, on_training) for task in tasks},
        request,
        SETTINGS,
    )


@cache
def _samples(task: GlyphTask, corruptions: tuple[str, ...], base: Path) -> TaskData:
    """All test samples of a task; corrupted ones once per corruption."""
    pictures, labels = task.test_set(TEST_IMAGES_PER_CLASS)
    if corruptions:
        pictures = torch.cat([corrupt(name, pictures) for name in corruptions])
        labels = labels.repeat(len(corruptions))
    return TaskData({"pixel_values": finetune.pixels(base, pictures)}, {"text_embeds": finetune.head(base, _model(base), task)}, labels)


@cache
def _model(base: Path) -> nn.Module:
    return ClipTask().load(base)


def expert_folder(task: GlyphTask, on_training: OnTraining | None = None) -> Path:
    """Where the task's fine-tuned tower is: in the package, or in the user's cache, where it is trained first if need be."""
    shipped = DATA / "experts" / task.name
    if shipped.is_dir():
        return shipped
    cached = cache_folder() / task.name
    if not cached.is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Trained beside its place and moved there whole: an interrupted training leaves no half expert.
        scratch = Path(tempfile.mkdtemp(prefix=f".{task.name}-", dir=cached.parent))
        try:
            finetune.finetune(BASE, task, scratch, on_step=partial(on_training, task.name) if on_training else None)
            scratch.chmod(0o755)
            scratch.replace(cached)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return cached


def cache_folder() -> Path:
    """``$MINGLE_CACHE`` or ``~/.cache/mingle``, by the base model's content: another base makes other experts."""
    files = json.loads((DATA / "manifest.json").read_text())["files"]
    return store.cache_folder() / "glyphs" / hashlib.sha256(files["base/model.safetensors"].encode()).hexdigest()[:12]
