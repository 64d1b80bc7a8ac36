"""Image tasks: test images decoded batch by batch, and the zero-shot classifier of their class names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from mingle.io.files import sha256
from mingle.io.hub import Revisions
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.kernels.store import cache_folder
from mingle.suites.clip_base import ClipBase
from mingle.suites.fusionbench import prompts
from mingle.suites.fusionbench.datasets import ImageTask
from mingle.suites.fusionbench.layout import DatasetError
from mingle.suites.fusionbench.loading import Split
from mingle.suites.protocol import Labels
from mingle.tasks import TaskData
from mingle.tasks.image_processor import ImageProcessor
from mingle.tasks.lazy import LazyInputs
from mingle.tasks.pixels import ImageError, read_image


class ImageSamples:
    """The test samples of an image task.

    Args:
        task: the task.
        splits: take the place of the task's own test split, one after another; empty keeps it.
        base: finds the base model's folder, whose image processor and tokenizer prepare the samples.
        revisions: the commits to keep to, see `mingle.io.hub`.
    """

    def __init__(
        self, task: ImageTask, splits: Sequence[str], base: Callable[[], ClipBase], revisions: Revisions
    ) -> None:
        self.task, self.base, self.revisions = task, base, revisions
        self.sources = [replace(task.source, split=split) for split in splits or (task.source.split,)]

    @cached_property
    def splits(self) -> list[Split]:
        return [Split(source, self.revisions) for source in self.sources]

    @cached_property
    def classes(self) -> tuple[list[str], list[str]]:
        """Class names and prompt templates."""
        if self.task.templates:
            return self.splits[0].declared_classes(), list(self.task.templates)
        return prompts.classes(self.task.model)

    @cached_property
    def labels(self) -> torch.Tensor:
        """Class numbers, int64 [n]."""
        return torch.cat([split.class_labels(len(self.classes[0])) for split in self.splits])

    def counted(self) -> Labels:
        """The labels with the classes' names."""
        return Labels(self.labels, self.classes[0])

    def check(self) -> None:
        """Check the data set, except for the images themselves, and the files that prepare them."""
        _ = self.labels
        self.base().check(*self.classes)

    def __call__(self) -> TaskData:
        """The samples, with images that are yet to be decoded."""
        labels, base = self.labels, self.base()
        pixels = _Pixels(self.splits, base.processor)
        inputs = LazyInputs(("pixel_values",), pixels, torch.arange(len(labels)))
        shared = {"text_embeds": head(base, *self.classes)}
        return TaskData(inputs, shared, labels, class_names=tuple(self.classes[0]))


class _Pixels:
    """Rows of the splits, one after another, through the base's image processor."""

    def __init__(self, splits: Sequence[Split], processor: ImageProcessor) -> None:
        self.processor = processor
        self.places = [(split, row) for split in splits for row in range(len(split))]

    def __call__(self, rows: list[int]) -> Mapping[str, torch.Tensor]:
        places = [self.places[row] for row in rows]
        of_split: dict[Split, list[int]] = {}
        for split, row in places:
            of_split.setdefault(split, []).append(row)
        stored = {
            split: dict(zip(numbers, split.rows(numbers), strict=True)) for split, numbers in of_split.items()
        }
        return {
            "pixel_values": torch.cat(
                [self._decoded(split, row, stored[split][row]) for split, row in places]
            )
        }

    def _decoded(self, split: Split, row: int, stored: Mapping[str, Any]) -> torch.Tensor:
        value = stored[split.source.columns[0]]
        encoded = value.get("bytes") if isinstance(value, dict) else value
        try:
            if not isinstance(encoded, bytes):
                raise ImageError("no bytes in it")
            return self.processor([read_image(encoded)])
        except ImageError as error:
            raise DatasetError(
                f"{split.source}: not a readable image: {split.place(row)} ({error})"
            ) from None


def head(base: ClipBase, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """The zero-shot classifier [C, P] of these class names.

    It is kept in the user's cache by the base's content, the names and the templates.
    """
    files = tuple(
        sorted(path for path in base.folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt"))
    )
    content = _content(files, tuple(path.stat().st_mtime_ns for path in files))
    key = hashlib.sha256(json.dumps([content, list(class_names), list(templates)]).encode()).hexdigest()
    path = cache_folder() / "heads" / f"{key[:32]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"text_embeds": base.head(class_names, templates)})
    return CheckpointReader(path).tensor("text_embeds")


@cache
def _content(files: tuple[Path, ...], changed: tuple[int, ...]) -> str:
    """The hashes of the files, computed anew when one has changed."""
    return " ".join(f"{path.name}:{sha256(path)}" for path in files)
