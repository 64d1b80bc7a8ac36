"""The evaluation suites of the papers: CLIP on up to twenty image tasks, and Flan-T5 on GLUE.

Base models, fine-tuned models and data sets are those of the hub, at commits that are noted when they are
first used; class names and prompts are those of the package `fusion_bench`.  Nothing is fetched or read
before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from mingle.io import hub
from mingle.suites import Suite
from mingle.suites.clip_base import ClipBase
from mingle.suites.fusionbench.clip import ImageSamples
from mingle.suites.fusionbench.datasets import GLUE_BASE, GLUE_SUITES, GLUE_TASKS, IMAGE_SUITES, NAMES
from mingle.suites.fusionbench.glue import SEEDS, GlueSamples
from mingle.suites.protocol import SeedRequest

__all__ = ["NAMES", "load"]


def load(name: str, base: Path | None, request: SeedRequest, revisions: hub.Revisions) -> Suite:
    """One of the suites in `NAMES`; see `mingle.suites.load`."""
    return (_images if name in IMAGE_SUITES else _glue)(name, base, request, revisions)


def _images(name: str, base: Path | None, request: SeedRequest, revisions: hub.Revisions) -> Suite:
    suite = IMAGE_SUITES[name]
    root = _base(base, suite.base, revisions)
    prepared = cache(lambda: ClipBase(root()))
    samples = {task.name: ImageSamples(task, suite.splits, prepared, revisions) for task in suite.tasks}
    models = {task.name: f"{_tuned(suite.base)}_{task.model}" for task in suite.tasks}
    return _suite(name, "clip", root, samples, models, request, revisions)


def _glue(name: str, base: Path | None, request: SeedRequest, revisions: hub.Revisions) -> Suite:
    root = _base(base, GLUE_BASE, revisions)
    samples = {task: GlueSamples(task, root, revisions) for task in GLUE_TASKS}
    models = {task: f"{_tuned(GLUE_BASE)}_glue-{task}{GLUE_SUITES[name]}" for task in GLUE_TASKS}
    return _suite(name, "seq2seq", root, samples, models, replace(request, total=SEEDS), revisions)


def _base(given: Path | None, model: str, revisions: hub.Revisions) -> Callable[[], Path]:
    return cache(lambda: given or hub.resolve(model, None, revisions))


def _tuned(base: str) -> str:
    """The common beginning of the ids of the models that were fine-tuned from a base."""
    return f"tanganke/{base.rpartition('/')[2]}"


def _suite(
    name: str,
    task_type: str,
    base: Callable[[], Path],
    samples: Mapping[str, ImageSamples | GlueSamples],
    models: Mapping[str, str],
    request: SeedRequest,
    revisions: hub.Revisions,
) -> Suite:
    experts = {task: partial(hub.resolve, model, None, revisions) for task, model in models.items()}
    return Suite(
        name,
        task_type,
        base,
        samples,
        experts,
        request,
        labels={task: made.counted for task, made in samples.items()},
        checks={task: made.check for task, made in samples.items()},
        revisions=revisions,
    )
