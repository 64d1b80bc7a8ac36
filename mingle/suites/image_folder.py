"""A suite from your own images: one folder per task, and in it one folder per class.

A class's folder has the name that the class has in prompts.

    <folder>/<task>/<class name>/*.png | *.jpg | …
    <folder>/<task>/templates.txt          optional: one prompt per line, with {} in the class name's place

Tasks and classes are taken in alphabetical order.  Hidden files, and files that are no images by their
suffix, do not count; links to images and folders are followed.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from mingle.io.files import naming
from mingle.suites import Suite
from mingle.suites.clip_base import ClipBase
from mingle.suites.protocol import Labels, SeedRequest
from mingle.suites.templates import read_templates
from mingle.tasks import TaskData
from mingle.tasks.pixels import ImageError, image_size, read_image

DEFAULT_TEMPLATES = ("a photo of a {}.",)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def load(folder: Path, base: Path, request: SeedRequest) -> Suite:
    """The suite in `folder`, prepared with the image processor and tokenizer of `base`.

    Raises:
        ValueError: a folder without tasks, a task without classes, a class without images, or a link to
            nothing; the message names it.
    """
    folders = _subfolders(folder)
    if not folders:
        raise ValueError(f"{folder}: no task folders in it")
    prepared = ClipBase(base)
    tasks = {task.name: FolderSamples(task, prepared) for task in folders}
    return Suite(
        str(folder),
        "clip",
        base,
        dict(tasks),
        {},
        request,
        labels={name: task.labels for name, task in tasks.items()},
        checks={name: task.check for name, task in tasks.items()},
    )


class FolderSamples:
    """The images of a task's folder.

    Args:
        folder: the task's folder.
        base: prepares its images and class names.

    Raises:
        ValueError: see `load`.
    """

    def __init__(self, folder: Path, base: ClipBase) -> None:
        self.folder, self.base = folder, base
        self.classes = {path.name: _images(path) for path in _subfolders(folder)}
        if not self.classes:
            raise ValueError(f"{folder}: no class folders in it")

    @cached_property
    def templates(self) -> list[str]:
        """The prompts of the task."""
        listed = self.folder / "templates.txt"
        there = listed.exists() or listed.is_symlink()
        return read_templates(listed) if there else list(DEFAULT_TEMPLATES)

    def labels(self) -> Labels:
        """The class of each image, in the order of the samples."""
        sizes = torch.tensor([len(images) for images in self.classes.values()])
        return Labels(torch.arange(len(sizes)).repeat_interleave(sizes), list(self.classes))

    def check(self) -> None:
        """Check the base's files, the prompts, and the header of every image; nothing is decoded.

        Raises:
            ValueError: what is broken is named.
        """
        self.base.check(list(self.classes), self.templates)
        for path in self._paths():
            try:
                self.base.processor.check_size(*image_size(path))
            except ImageError as error:
                raise ValueError(f"{path}: not a readable image: {error}") from None

    def __call__(self) -> TaskData:
        """All images, decoded.

        Raises:
            ValueError: an image that cannot be read is named.
        """
        head = self.base.head(list(self.classes), self.templates)
        images = torch.cat([self._pixels(path) for path in self._paths()])
        names = tuple(self.classes)
        return TaskData(
            {"pixel_values": images}, {"text_embeds": head}, self.labels().numbers, class_names=names
        )

    def _paths(self) -> list[Path]:
        return [path for images in self.classes.values() for path in images]

    def _pixels(self, path: Path) -> torch.Tensor:
        try:
            return self.base.processor([read_image(path)])
        except ImageError as error:
            raise ValueError(f"{path}: not a readable image: {error}") from None


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, in alphabetical order, but for hidden files."""
    with naming(folder):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    entries = _entries(folder)
    for path in entries:
        if path.is_symlink() and not path.exists() and path.name != "templates.txt":
            raise ValueError(f"{path}: a link to {path.readlink()}, which does not exist")
    folders = [path for path in entries if path.is_dir()]
    for path in folders:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: the folder name {path.name!r} in it is not UTF-8 text") from None
    return folders


def _images(folder: Path) -> list[Path]:
    """The paths of a class's images.

    Raises:
        ValueError: there are none; the message says what there is instead.
    """
    entries = _entries(folder)
    images = [path for path in entries if path.suffix.lower() in _SUFFIXES]
    if not images:
        others = sorted({path.suffix.lower() for path in entries if path.suffix})
        found = f"; it has files of {', '.join(others)}" if others else ""
        raise ValueError(f"{folder}: no images in it{found}; read are {', '.join(_SUFFIXES)}")
    return images
