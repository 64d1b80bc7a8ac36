"""The tasks and suites by name: each task's data set, split and columns, and the tasks of each suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A labelled split of a data set on the hub.

    Attributes:
        repo: the data set's id.
        split: the name of the split, which holds the test samples.
        config: the data set's configuration; None where it has only one.
        columns: the columns of the samples.
        labels: possible names of the column of labels; the first that exists counts.
    """

    repo: str
    split: str = "test"
    config: str | None = None
    columns: tuple[str, ...] = ("image",)
    labels: tuple[str, ...] = ("label",)

    def __str__(self) -> str:
        return f"{self.repo}{f' ({self.config})' if self.config else ''}, split {self.split!r}"


@dataclass(frozen=True)
class ImageTask:
    """A task of images.

    Attributes:
        name: its name in suites.
        source: where its test images are.
        model: its name in the ids of the hub's fine-tuned models, and in `fusion_bench`.
        templates: prompts with ``{}`` in the class name's place, for a task that is not in `fusion_bench`;
            its class names are then those that the data set declares.
    """

    name: str
    source: Source
    model: str
    templates: tuple[str, ...] = ()


def _image_task(name: str, repo: str | None = None, split: str = "test", **other: object) -> ImageTask:
    source = Source(repo or f"tanganke/{name}", split, **other)  # type: ignore[arg-type]
    return ImageTask(name, source, name)


#: in the published order, which the seeds of task orders shuffle
IMAGE_TASKS: tuple[ImageTask, ...] = (
    _image_task("sun397"),
    _image_task("stanford-cars", "tanganke/stanford_cars"),
    _image_task("resisc45"),
    _image_task("eurosat"),
    _image_task("svhn", "ufldl-stanford/svhn", config="cropped_digits"),
    _image_task("gtsrb"),
    _image_task("mnist", "ylecun/mnist"),
    _image_task("dtd"),
    _image_task("oxford_flowers102", "dpdl-benchmark/oxford_flowers102"),
    _image_task("pcam", "1aurent/PatchCamelyon"),
    _image_task("fer2013", "clip-benchmark/wds_fer2013", columns=("jpg",), labels=("cls",)),
    _image_task("oxford-iiit-pet", "timm/oxford-iiit-pet"),
    _image_task("stl10"),
    _image_task("cifar100", labels=("fine_label", "label")),
    _image_task("cifar10"),
    _image_task("food101", "ethz/food101", "validation"),
    _image_task("fashion_mnist", "zalando-datasets/fashion_mnist"),
    _image_task("emnist_letters"),
    _image_task("kmnist"),
    _image_task("rendered-sst2", "nateraw/rendered-sst2"),
)
_BY_NAME = {task.name: task for task in IMAGE_TASKS}


def _alias(name: str, known: str) -> ImageTask:
    return ImageTask(name, _BY_NAME[known].source, known)


#: eleven tasks of different domains, in the published, alphabetical order
MTIL_TASKS: tuple[ImageTask, ...] = (
    ImageTask("aircraft", Source("tanganke/aircraft"), "aircraft", ("a photo of a {}, a type of aircraft.",)),
    ImageTask(
        "caltech101", Source("tanganke/caltech101"), "caltech101", ("a photo of a {}.", "a photo of the {}.")
    ),
    *(_BY_NAME[name] for name in ("cifar100", "dtd", "eurosat")),
    _alias("flowers", "oxford_flowers102"),
    *(_BY_NAME[name] for name in ("food101", "mnist")),
    _alias("pets", "oxford-iiit-pet"),
    _alias("cars", "stanford-cars"),
    _BY_NAME["sun397"],
)

#: splits of corrupted test images, of these tasks
CORRUPTIONS = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)
CORRUPTED_TASKS = tuple(_BY_NAME[name] for name in ("stanford-cars", "eurosat", "resisc45", "gtsrb"))

BASES = {
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-b16": "openai/clip-vit-base-patch16",
    "clip-l14": "openai/clip-vit-large-patch14",
}


@dataclass(frozen=True)
class ImageSuite:
    """A suite of image tasks.

    Attributes:
        base: the hub id of the pre-trained model.
        tasks: its tasks in order.
        splits: the splits that replace each task's own test split, one after another.
    """

    base: str
    tasks: tuple[ImageTask, ...]
    splits: tuple[str, ...] = ()


IMAGE_SUITES: Mapping[str, ImageSuite] = {
    **{
        f"{size}-{count}": ImageSuite(base, IMAGE_TASKS[:count])
        for size, base in BASES.items()
        for count in (8, 14, 20)
    },
    "mtil-11": ImageSuite(BASES["clip-b16"], MTIL_TASKS),
    "clip-b32-clean": ImageSuite(BASES["clip-b32"], CORRUPTED_TASKS),
    "clip-b32-corrupted": ImageSuite(BASES["clip-b32"], CORRUPTED_TASKS, CORRUPTIONS),
    **{f"clip-b32-{name}": ImageSuite(BASES["clip-b32"], CORRUPTED_TASKS, (name,)) for name in CORRUPTIONS},
}

_SENTENCES = ("sentence1", "sentence2")
#: the GLUE tasks in the published order, with the columns that their prompts use
GLUE_TASKS: Mapping[str, Source] = {
    name: Source("glue", split, name, columns)
    for name, split, columns in (
        ("cola", "validation", ("sentence",)),
        ("mnli", "validation_matched", ("premise", "hypothesis")),
        ("mrpc", "validation", _SENTENCES),
        ("qnli", "validation", ("question", "sentence")),
        ("qqp", "validation", ("question1", "question2")),
        ("rte", "validation", _SENTENCES),
        ("sst2", "validation", ("sentence",)),
        ("stsb", "validation", _SENTENCES),
    )
}
GLUE_BASE = "google/flan-t5-base"
#: suite → the suffix behind the task in the names of its fine-tuned models
GLUE_SUITES: Mapping[str, str] = {"glue-8": "", "glue-8-lora": "_lora-16"}

NAMES = (*IMAGE_SUITES, *GLUE_SUITES)
