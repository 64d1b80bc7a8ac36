"""Evaluation suites: tasks with test samples, seed samples and fine-tuned models, under one of two protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle.io.hub import Revisions
from mingle.options import OptionError, nearest
from mingle.suites.protocol import PROTOCOLS, SeedRequest, split
from mingle.tasks import TaskData

#: Progress of training an expert that is not there yet: called with (task, step, steps).
OnTraining = Callable[[str, int, int], None]


class Suite(Mapping[str, TaskData]):
    """Tasks in their published order; ``suite[name]`` are a task's labelled test samples.

    Args:
        name: under which it is reported.
        task_type: of all its tasks.
        base: the base model's folder, or what finds it on first use.
        samples: name → all labelled test samples of the task, made on first use.
        experts: name → folder of the task's fine-tuned model, made on first use.
        request: how many seed samples to take, and under which protocol.
        settings: by method, options that suit this suite's models.  A learning rate that suits one loss may
            ruin another.
        continued: (name, names before it) → folder of the task's model, fine-tuned from that of the task
            before, and so on back to the base; None where all fine-tuned models of the suite start from the
            base.
        training: name → all unlabelled training samples of the task; empty where the suite has none.
        checks: name → finds what is wrong with the task's data without reading all of it; none where nothing
            can be.
        revisions: of what came from the hub, the commits in use; grows as the suite is used.
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
        checks: Mapping[str, Callable[[], None]] | None = None,
        revisions: Revisions | None = None,
    ) -> None:
        self.name, self.task_type, self.request = name, task_type, request
        self.revisions: Revisions = {} if revisions is None else revisions
        self._base, self._checks = base, dict(checks or {})
        self.settings = dict(settings or {})
        self._samples, self._experts = dict(samples), dict(experts)
        self._continued, self._training = continued, dict(training or {})
        self._split: dict[str, tuple[TaskData, TaskData]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, name: object) -> bool:
        return name in self._samples  # a mapping's own way would make the samples

    def __getitem__(self, name: str) -> TaskData:
        return self._parts(name)[1]

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self._base if isinstance(self._base, Path) else self._base()

    def check_task_type(self, name: str, base: Path | None) -> None:
        """Refuse, by `OptionError`, samples that a model of this task type cannot take; `base` is its folder."""
        if self.task_type != name:
            model = base or "the base"
            raise OptionError(
                f"suite {self.name!r} is for {self.task_type} models, but {model} is a {name} model"
            )

    def check(self, name: str) -> None:
        """Find what is wrong with a task's data, as far as that takes no heavy work; whatever it raises names
        the data set.
        """
        if name in self._checks:
            self._checks[name]()

    def seeds(self, name: str, *, whole: bool = False) -> TaskData:
        """The task's seed samples, without labels; or, for sequential methods, its `whole` training data,
        none of which is a test sample.

        Raises:
            OptionError: the whole training data of a suite that has none.
        """
        return self._whole(name)() if whole else self._parts(name)[0]

    def expert(self, name: str, after: Sequence[str] = ()) -> Path:
        """The folder of the task's model: fine-tuned from the base, or one task `after` the other, each from
        the model before.

        Raises:
            OptionError: tasks before it, in a suite whose fine-tuned models all start from the base.
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
                f"suite {self.name!r}: its fine-tuned models all start from the base; sequential methods need them in a chain"
            )
        return self._continued

    def _whole(self, name: str) -> Callable[[], TaskData]:
        if name not in self._training:
            raise OptionError(
                f"suite {self.name!r}: sequential methods adapt on all training samples, and it has none of {name!r}"
            )
        return self._training[name]

    def _parts(self, name: str) -> tuple[TaskData, TaskData]:
        if name not in self._split:
            if name not in self._samples:
                raise KeyError(f"suite {self.name!r} has no task {name!r}{nearest(name, self._samples)}")
            self._split[name] = split(name, self._samples[name](), self.request)
        return self._split[name]


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
            ``glyphs4-<corruption>``; of the papers' suites, ``clip-b32-8`` (also ``b16``, ``l14``, and 14 or
            20 tasks), ``mtil-11``, ``clip-b32-corrupted``, ``clip-b32-<corruption>``, ``clip-b32-clean``,
            ``glue-8``, ``glue-8-lora``; or the path of a folder as `mingle.suites.image_folder` describes it.
        base: the folder of the base model whose image processor and tokenizer prepare the samples; None takes
            the suite's own.
        protocol: ``strict`` or ``official``, see `mingle.suites.protocol`.
        samples_per_class: how many seed samples a task may use, times its number of classes.
        seed: of the choice of seed samples.
        on_training: told when an expert that does not ship has to be trained.
        revisions: the commits of hub repositories to keep to, see `mingle.io.hub`; those found are noted in
            it.

    Raises:
        OptionError: an unknown suite or protocol.
    """
    from mingle.suites import fusionbench, glyphs, image_folder

    if protocol not in PROTOCOLS:
        raise OptionError(
            f"protocol: {protocol!r}{nearest(protocol, PROTOCOLS)}; expected one of {', '.join(PROTOCOLS)}"
        )
    request = SeedRequest(protocol, samples_per_class, seed)
    if name in glyphs.NAMES:
        return glyphs.load(name, base, request, on_training)
    if name in fusionbench.NAMES:
        return fusionbench.load(name, base, request, {} if revisions is None else revisions)
    if Path(name).is_dir():
        if base is None:
            raise OptionError(f"suite {name!r}: a folder of images has no model of its own; name the base")
        return image_folder.load(Path(name), base, request)
    known = (*glyphs.NAMES, *fusionbench.NAMES)
    raise OptionError(
        f"unknown suite {name!r}{nearest(name, known)}; known are {', '.join(known)}, or the path of a folder"
    )
