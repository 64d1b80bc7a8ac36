"""A suite from your own images: one folder per task, and in it one folder per class.

A class's folder has the name that the class has in prompts.

    <folder>/<task>/<class name>/*.png | *.jpg | …
    <folder>/<task>/templates.txt          optional: one prompt per line, with {} in the class name's place

Tasks and classes are taken in alphabetical order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from mingle.suites import Suite
from mingle.suites.protocol import SeedRequest
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask, processor_pixels, zero_shot_head

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def load(folder: Path, base: Path, request: SeedRequest) -> Suite:
    """The suite in `folder`, prepared with the image processor and tokenizer of `base`.

    Raises:
        ValueError: a folder without tasks, a task without classes, or a class without images; the message
            names it.
    """
    tasks = _subfolders(folder)
    if not tasks:
        raise ValueError(f"{folder}: no task folders in it")
    for task in tasks:
        if not _subfolders(task):
            raise ValueError(f"{task}: no class folders in it")
        for class_folder in _subfolders(task):
            if not _images(class_folder):
                raise ValueError(f"{class_folder}: no images in it")
    return Suite(
        str(folder), "clip", base, {task.name: partial(_samples, task, base) for task in tasks}, {}, request
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)


def _samples(task: Path, base: Path) -> TaskData:
    from PIL import Image
    from transformers import CLIPTokenizer

    classes = _subfolders(task)
    images, labels = [], []
    for label, class_folder in enumerate(classes):
        for path in _images(class_folder):
            try:
                with Image.open(path) as image:
                    images.append(processor_pixels(base, [image.convert("RGB")]))
            except OSError as error:
                raise ValueError(f"{path}: not a readable image ({error})") from None
            labels.append(label)
    listed = task / "templates.txt"
    templates = (
        [line for line in listed.read_text().splitlines() if line.strip()]
        if listed.exists()
        else DEFAULT_TEMPLATES
    )
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"{listed}: the prompt {template!r} has no {{}} for the class name")
    tokenizer = CLIPTokenizer.from_pretrained(base, local_files_only=True)
    head = zero_shot_head(ClipTask().load(base), tokenizer, [folder.name for folder in classes], templates)
    return TaskData({"pixel_values": torch.cat(images)}, {"text_embeds": head}, torch.tensor(labels))
