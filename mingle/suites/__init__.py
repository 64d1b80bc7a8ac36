"""Evaluation suites: tasks with test samples, seed samples and fine-tuned models, under two protocols."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle.io.hub import Revisions
from mingle.options import OptionError, nearest
from mingle.suites.protocol import PROTOCOLS, Labels, SeedRequest, check_labels, split, tested
from mingle.tasks import TaskData

logger = logging.getLogger(__name__)

#: Progress of training an expert that does not exist yet: called with (task, step, steps).
OnTraining = Callable[[str, int, int], None]


class Suite(Mapping[str, TaskData]):
    """Tasks in their published order; ``suite[name]`` are a task's labelled test samples.

    Args:
        name: under which it is reported.
        task_type: of all its tasks.
        base: the base model's folder, or a function that finds it on first use.
        samples: name → all labelled test samples of the task, made on first use.
        experts: name → folder of the task's fine-tuned model, made on first use.
        request: how many seed samples to take, and under which protocol.
        settings: by method, options that suit this suite's models.  They differ between methods: a learning
            rate that suits one loss may ruin another.
        continued: (name, names before it) → folder of the task's model, in a chain from the base in which
            each is fine-tuned from the one before; None where all fine-tuned models of the suite start from
            the base.
        training: name → all unlabelled training samples of the task; empty where the suite has none.
        labels: name → the labels of all its test samples, without the samples; a task whose samples have to
            be made for that has none.
        checks: name → a function that raises for faults in the task's data, without reading all of it; a task
            that cannot be checked has none.
        revisions: the commits in use of whatever came from the hub; grows as the suite is used.
    """

    def __init__(
        self,
        name: str,
        task_type: str,
        base: Path | Callable[[], Path],
        samples: Mapping[str, Callable[[], TaskData]],
        experts: Mapping[str, Callable[[], Path]],
        request: SeedRequest,
        settings: Mapping[str, dict[str, Any]] | None = None,
        *,
        continued: Callable[[str, tuple[str, ...]], Path] | None = None,
        training: Mapping[str, Callable[[], TaskData]] | None = None,
        labels: Mapping[str, Callable[[], Labels]] | None = None,
        checks: Mapping[str, Callable[[], None]] | None = None,
        revisions: Revisions | None = None,
    ) -> None:
        self.name, self.task_type, self.request = name, task_type, request
        self.revisions: Revisions = {} if revisions is None else revisions
        self._base, self._labels, self._checks = base, dict(labels or {}), dict(checks or {})
        self.settings = dict(settings or {})
        self._samples, self._experts = dict(samples), dict(experts)
        self._continued, self._training = continued, dict(training or {})
        self._split: dict[str, tuple[TaskData, TaskData]] = {}
        #: by task, which classes are short of samples, in words
        self._short: dict[str, str] = {}
        #: by task, how many test samples there are
        self._sizes: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, name: object) -> bool:
        return name in self._samples  # Mapping's own method would make the samples

    def __getitem__(self, name: str) -> TaskData:
        return self._parts(name)[1]

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self._base if isinstance(self._base, Path) else self._base()

    def check_task_type(self, name: str, base: Path | None) -> None:
        """Raise `OptionError` unless the suite is for models of task type `name`; `base` is their folder."""
        if self.task_type != name:
            model = base or "the base"
            raise OptionError(
                f"suite {self.name!r} is for {self.task_type} models, but {model} is a {name} model"
            )

    def check(self, name: str) -> None:
        """Check a task's data, and that it has the samples that seeds need, short of heavy work.

        Any error names the data set or the task.
        """
        if name in self._checks:
            self._checks[name]()
        self._count(name)

    def shortage(self, name: str) -> str:
        """Which of a checked task's classes have fewer samples than seeds are asked for; empty for none."""
        return self._short.get(name, "")

    def size(self, name: str) -> int | None:
        """How many test samples a checked task has; None where that is not known before they are made."""
        return self._sizes.get(name)

    def seeds(self, name: str, *, whole: bool = False) -> TaskData:
        """The task's seed samples, without labels; or, for sequential methods, its `whole` training data.

        The training data does not overlap with the test samples.

        Raises:
            OptionError: `whole`, of a suite without training data.
        """
        return self._whole(name)() if whole else self._parts(name)[0]

    def has_expert(self, name: str) -> bool:
        """Whether the suite brings the task's fine-tuned model."""
        return name in self._experts

    def expert(self, name: str, after: Sequence[str] = ()) -> Path:
        """The folder of the task's fine-tuned model.

        It was fine-tuned from the base, or, where there are tasks that it comes `after`, at the end of a
        chain through their models, each fine-tuned from the one before.

        Raises:
            OptionError: a chain is asked for, and all fine-tuned models of the suite start from the base.
        """
        if not after:
            return self._experts[name]()
        return self._chain()(name, tuple(after))

    def check_sequential(self) -> None:
        """Raise `OptionError` unless sequential methods can run on this suite."""
        self._chain()
        for name in self:
            self._whole(name)

    def _chain(self) -> Callable[[str, tuple[str, ...]], Path]:
        if self._continued is None:
            raise OptionError(
                f"suite {self.name!r}: its fine-tuned models all start from the base; "
                "sequential methods need each fine-tuned from the one before"
            )
        return self._continued

    def _whole(self, name: str) -> Callable[[], TaskData]:
        if name not in self._training:
            raise OptionError(
                f"suite {self.name!r}: sequential methods adapt on all training samples, "
                f"and it has none of {name!r}"
            )
        return self._training[name]

    def _parts(self, name: str) -> tuple[TaskData, TaskData]:
        if name not in self._split:
            if name not in self._samples:
                raise KeyError(f"suite {self.name!r} has no task {name!r}{nearest(name, self._samples)}")
            self._count(name)
            self._split[name] = split(name, self._samples[name](), self.request)
        return self._split[name]

    def _count(self, name: str) -> None:
        """Check the task's labels; once, as a warning should come once."""
        if name in self._labels and name not in self._short:
            labels = self._labels[name]()
            self._short[name] = check_labels(name, labels, self.request)
            self._sizes[name] = tested(labels.numbers, self.request)
            if self._short[name]:
                logger.warning("task %s: %s", name, self._short[name])


def load(
    name: str,
    *,
    base: Path | None = None,
    protocol: str = "strict",
    samples_per_class: int = 5,
    seed: int = 0,
    on_training: OnTraining | None = None,
    revisions: Revisions | None = None,
) -> Suite:
    """A suite by name, or from a folder of images.

    Args:
        name: ``glyphs4``, ``glyphs8``, ``glyphs20``, ``glyphs8-shared``, ``glyphs4-corrupted``,
            ``glyphs4-<corruption>``; ``texts8``; of the papers' suites, ``clip-b32-8`` (also ``b16``,
            ``l14``, and 14 or 20 tasks), ``mtil-11``, ``clip-b32-corrupted``, ``clip-b32-<corruption>``,
            ``clip-b32-clean``, ``glue-8``, ``glue-8-lora``; or the path of a folder as
            `mingle.suites.image_folder` describes it.
        base: the folder of the base model whose image processor and tokenizer prepare the samples; None takes
            the suite's own.
        protocol: ``strict`` or ``official``, see `mingle.suites.protocol`.
        samples_per_class: seed samples of a task, per class.
        seed: of the choice of seed samples.
        on_training: told when an expert that does not ship with the package has to be trained.
        revisions: the commits of hub repositories to keep to, see `mingle.io.hub`; those found are noted
            there.

    Raises:
        OptionError: an unknown suite or protocol, or a number of seed samples below 0.
    """
    from mingle.suites import fusionbench, glyphs, image_folder, texts

    if protocol not in PROTOCOLS:
        raise OptionError(
            f"protocol: {protocol!r}{nearest(protocol, PROTOCOLS)}; expected one of {', '.join(PROTOCOLS)}"
        )
    if samples_per_class < 0:
        raise OptionError(f"samples_per_class={samples_per_class}: expected 0 or more")
    request = SeedRequest(protocol, samples_per_class, seed)
    if name in glyphs.NAMES:
        return glyphs.load(name, base, request, on_training)
    if name in texts.NAMES:
        return texts.load(name, base, request, on_training, {} if revisions is None else revisions)
    if name in fusionbench.NAMES:
        return fusionbench.load(name, base, request, {} if revisions is None else revisions)
    if Path(name).is_dir():
        if base is None:
            raise OptionError(f"suite {name!r}: a folder of images has no model of its own; name the base")
        return image_folder.load(Path(name), base, request)
    known = names()
    raise OptionError(
        f"unknown suite {name!r}{nearest(name, known)}; known are {', '.join(known)}, or the path of a folder"
    )


def names() -> tuple[str, ...]:
    """The suites that `load` knows by name."""
    from mingle.suites import fusionbench, glyphs, texts

    return (*glyphs.NAMES, *texts.NAMES, *fusionbench.NAMES)
