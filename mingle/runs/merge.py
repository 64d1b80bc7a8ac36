"""Merges that live in folders: started, saved after every task, resumed, extended, evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mingle import methods, ranks, suites, tasks
from mingle.io import hub, leftovers, merger_folder, rollback
from mingle.io.files import CheckpointError, free_space, writable
from mingle.io.manifest import MANIFEST, read_manifest
from mingle.io.merger_folder import Saved
from mingle.merging import exports
from mingle.merging.evaluate import Result
from mingle.merging.explain import Explanation
from mingle.merging.explain import explain as explained
from mingle.merging.exports import Format
from mingle.merging.merger import Merger
from mingle.merging.opened import check_known, opened
from mingle.merging.sharded import ShardedMerger
from mingle.merging.streamed import StreamedMerger, streams
from mingle.merging.vocabulary import Vocabulary
from mingle.methods import MergeMethod
from mingle.options import OptionError, build
from mingle.runs import course, devices, forecast, inputs, room, sharding, timings
from mingle.runs.config import Expert, MergeConfig
from mingle.runs.forecast import Forecast
from mingle.runs.loop import Evaluate, MergeStep, experts_of, merge_all, stream_all
from mingle.runs.observer import Observer
from mingle.runs.origin import check_origin, origin
from mingle.runs.sharding import Shard
from mingle.runs.traces import gates_of
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS
from mingle.tasks import TaskType


@dataclass(frozen=True)
class MergePlan:
    """A config whose files were all found to fit, ready to run; `mingle.runs.check` makes it.

    Attributes:
        config: the config as it was read.
        task: the base model's task type.
        options: all of the method's options, resolved.
        suite: the tasks' samples, or None for a merge without data and without evaluation.
        base: the base model's folder.
        experts: name → folder of the fine-tuned model, or of its LoRA adapter.
        orders: the task orders to merge in.
        folders: where each order's merged model goes; empty for a plan that was only to be checked.
        revisions: the commits in use of whatever comes from the hub; they are saved with the merged model.
        left: name → what fine-tuning changed in that model and merging leaves out, in words.
        sources: option → who chose it, in words.
        fitted: the method, fitted to the base without weights, from which sizes are known.
        forecast: what the merge will take, where it goes tensor by tensor, with no whole model in memory.
    """

    config: MergeConfig
    task: TaskType
    options: Mapping[str, Any]
    suite: Suite | None
    base: Path
    experts: Mapping[str, Path]
    orders: list[list[str]]
    folders: list[Path]
    revisions: hub.Revisions
    left: Mapping[str, list[str]]
    sources: Mapping[str, str]
    fitted: MergeMethod
    forecast: Forecast | None = None

    def run(self, observer: Observer | None = None) -> Iterator[Result]:
        """Merge in every order, saving after each task; the tasks that an earlier run has merged are kept.

        Yields:
            Each order's result.
        """
        observer = observer or Observer()
        evaluate: Evaluate = "every" if self.config.eval.every_step else "last"
        for number, (order, folder) in enumerate(zip(self.orders, self.folders, strict=True)):
            with merger_folder.writing(folder):
                merger = self._begin(folder)
                if len(merger.merged) == len(order):
                    self._keep(folder)
                if isinstance(merger, StreamedMerger):
                    steps = stream_all(
                        merger, order, self._expert, folder, observer, number, keep=self.config.keep
                    )
                    for step in steps:
                        timings.note(folder, step)
                else:
                    merging = merge_all(
                        merger, order, self._expert, self.suite, observer, number, evaluate=evaluate
                    )
                    for step in merging:
                        inputs.note(merger.metadata, step.task, self.experts[step.task])
                        _note_course(merger, step, self.suite, last=len(merger.merged) == len(order))
                        merger.save_pretrained(folder, keep=self.config.keep)
                        timings.note(folder, step)
                result = merger.result()
            observer.merged(self.config.method, number, result)
            yield result

    def _keep(self, folder: Path) -> None:
        """Let a folder in which everything is merged have as many generations as are asked for now."""
        with ranks.together("forgetting old generations"):
            if self.config.keep is not None and ranks.rank() == 0:
                rollback.keep_only(folder, self.config.keep)

    def begun(self) -> bool:
        """Whether any task was merged and saved, be it by an earlier run."""
        return any((folder / MANIFEST).exists() for folder in self.folders)

    def origin(self) -> dict[str, Any]:
        """The metadata that `add` and `evaluate` need to go on as the merge started."""
        adapt, evaluation = self.config.adapt, self.config.eval
        return origin(
            evaluation.suite, adapt.protocol, adapt.samples_per_class, evaluation.batch_size, self.revisions
        )

    def _expert(self, name: str, _: Sequence[str]) -> Path:
        return self.experts[name]

    def shared_out(self) -> bool:
        """Whether the weights of its models are, where it is in memory; all processes ask."""
        size = room.of_method(self.fitted, self.base)
        memory = room.in_memory(self.fitted, size, len(self.experts))
        return sharding.decided(self.config.shard, self.fitted, sum(memory.values()))

    def memory(self) -> dict[str, int]:
        """See `mingle.runs.room.in_memory`; all processes ask."""
        size, shared = room.of_method(self.fitted, self.base), self.shared_out()
        return room.in_memory(self.fitted, size, len(self.experts), ranks.size() if shared else None)

    def _begin(self, folder: Path) -> Merger | StreamedMerger:
        """The merger of an interrupted run, or a new one."""
        in_memory = None
        if self.forecast is None:
            in_memory = ShardedMerger if self.shared_out() else Merger
        kind: type[Merger | StreamedMerger] = in_memory or StreamedMerger
        device = devices.usual() if in_memory else None  # tensors from files are merged on the CPU
        if not (folder / MANIFEST).exists():
            merger = kind(
                self.base,
                self.config.method,
                self.task.name,
                device=device,
                vocabulary=self.config.vocabulary,
                dtype=self.config.dtype,
                **self.options,
            )
            merger.metadata = self.origin()
            return merger
        if in_memory is not None:
            merger = in_memory.from_pretrained(folder, device=device)
        else:
            merger = StreamedMerger.from_pretrained(folder)
        if merger.base_hash != kind.hash_of(self.task, self.base, self.config.dtype):
            raise CheckpointError(f"{folder}: was started with a base model other than {self.base}")
        merger.metadata["revisions"] = self.revisions
        return merger


def add(
    folder: Path,
    expert: Expert,
    overrides: Mapping[str, Any],
    observer: Observer | None = None,
    vocabulary: Vocabulary | None = None,
    adapt: Mapping[str, Any] | None = None,
    shard: Shard = "auto",
) -> Result:
    """Merge one more model into a merged one, evaluate where there is a suite, and save.

    Args:
        folder: the folder that a merge wrote.
        expert: the task and its fine-tuned model.
        overrides: the parts of the merge's origin that change from now on, see `mingle.runs.origin`.
        observer: told how the merge is getting on.
        vocabulary: see `mingle.Merger`; None leaves it as it was so far.
        adapt: see `mingle.Merger.from_pretrained`.
        shard: see `mingle.runs.sharding`.
    """
    with ranks.together("checking"):
        if ranks.rank() == 0:
            writable(folder)
    with merger_folder.writing(folder, new=False):
        merger, suite = _extended(folder, overrides, adapt, shard)
        merger.vocabulary = vocabulary or merger.vocabulary
        if suite is not None and expert.name not in suite:
            raise OptionError(f"suite {suite.name!r} has no task {expert.name!r}; it has {', '.join(suite)}")
        model = hub.resolve(expert.model, expert.revision, merger.metadata["revisions"])
        if suite is not None:
            suite.check(expert.name)
        merger.check_name(expert.name)
        assert merger.base_folder is not None  # without a base in the folder, it would not have been opened
        if isinstance(merger, StreamedMerger):
            written = forecast.of_step(merger.method, len(merger.merged)) - leftovers.finished_bytes(folder)
        else:
            written = room.of_method(merger.method, merger.base_folder).saved_each(1, len(merger.merged))
        free_space(folder, written)
        order = [*merger.task_names, expert.name]
        if isinstance(merger, StreamedMerger):
            for step in stream_all(merger, order, lambda *_: model, folder, observer or Observer()):
                timings.note(folder, step)
            return merger.result()
        for step in merge_all(merger, order, lambda *_: model, suite, observer or Observer()):
            inputs.note(merger.metadata, expert.name, model)
            _note_course(merger, step, suite, last=True)
            merger.save_pretrained(folder)
            timings.note(folder, step)
        return merger.result()


def evaluate(folder: Path, overrides: Mapping[str, Any], batch_size: int, shard: Shard = "auto") -> Result:
    """Accuracy of a merged model on all its tasks; nothing is written."""
    merger, suite = _reopen(folder, overrides, device=devices.usual(), kind=_kind_of(folder, shard))
    if suite is None:
        raise OptionError("suite: name one, with --suite; the merge was made without a suite")
    return merger.evaluate(suite, batch_size)


def explain(
    folder: Path,
    overrides: Mapping[str, Any],
    given: Mapping[str, str],
    batch_size: int,
    on_task: Callable[[str], None] | None = None,
) -> list[Explanation]:
    """What each step of merging cost every task, see `mingle.merging.explain`; nothing is written.

    Args:
        folder: the folder that a merge wrote.
        overrides: as for `add`.
        given: task → its fine-tuned model, a folder or a hub id; those of a suite that has models are found.
        batch_size: samples per batch.
        on_task: told of every task before it is looked at.

    Raises:
        OptionError: no samples, or a name that is not a merged task's.
    """
    merger, suite = _reopen(folder, overrides)
    if suite is None:
        raise OptionError("suite: name one, with --suite; the merge was made without a suite")
    if unknown := [name for name in given if name not in merger.task_names]:
        known = ", ".join(merger.task_names)
        raise OptionError(f"--expert {unknown[0]}: no task of that name was merged; there are {known}")
    revisions = merger.metadata["revisions"]
    models = {name: hub.resolve(model, None, revisions) for name, model in given.items()}
    find = experts_of(suite, sequential=merger.method.sequential)
    for place, name in enumerate(merger.task_names):
        if name not in models and suite.has_expert(name):
            models[name] = find(name, merger.task_names[:place])
    return explained(merger, suite, models, batch_size, on_task)


def export(
    folder: Path,
    out: Path,
    overrides: Mapping[str, Any],
    task: str | None = None,
    format: Format = "transformers",
) -> None:
    """Write a merged model for other programs, see `Merger.export`.

    Where the model of one task has means of gates in its weights, they are over the seed samples of the
    merge's suite, if it has one.

    Args:
        folder: the folder that a merge wrote.
        out: a new or an empty folder.
        overrides: as for `add`.
        task, format: see `Merger.export`.
    """
    exports.check(task, format, seeds=False)
    if format == "transformers" and not overrides and (streaming := _exporting(folder, task)):
        streaming.export(folder, out, task)
        return
    merger, seeds = Merger.from_pretrained(folder), None
    if task is not None and merger.method.folds_by_means:
        merger.model_for(task)  # which refuses an unknown one before samples are made
        suite = suite_of(merger, folder, overrides, [task])
        seeds = None if suite is None else suite.seeds(task)
    elif overrides:
        name = next(iter(overrides)).replace("_", "-")
        reason = "samples are only for the model of one task, with a method whose gates depend on the input"
        raise OptionError(f"--{name}: {reason}")
    merger.export(out, task, format, seeds)


def _exporting(folder: Path, task: str | None) -> StreamedMerger | None:
    """What writes a merge tensor by tensor; None where that takes a model, or cannot be done."""
    saved = Saved(folder, read_manifest(folder))
    merge = saved.manifest
    check_known(merge, folder / MANIFEST)
    samples = task is not None and merge["metadata"].get("suite") is not None
    if not _streams(saved) or (samples and methods.get(merge["method"]).folds_by_means):
        return None
    merger = StreamedMerger.from_pretrained(folder)
    return merger if merger.exportable() else None


def _streams(saved: Saved) -> bool:
    """Whether a merge that was saved goes on tensor by tensor."""
    merge = saved.manifest
    task, method = tasks.get(merge["task_type"]), methods.get(merge["method"])
    options: Any = build(method.Options, merge["options"], "options")
    return streams(method, options, task, task.skeleton(saved.base_folder()))


def _note_course(merger: Merger, step: MergeStep, suite: Suite | None, *, last: bool) -> None:
    """Note in the metadata how the gates of a task learned, and after the last task what all gates are."""
    course.note(merger.metadata, step)
    if last and suite is not None:
        course.note_gates(merger.metadata, gates_of(merger, suite))


def _reopen(
    folder: Path,
    overrides: Mapping[str, Any],
    adapt: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    kind: type[Merger] = Merger,
) -> tuple[Merger, Suite | None]:
    """A merged model and its suite, with the caller's changes to its origin and its adaptation."""
    merger = kind.from_pretrained(folder, adapt=adapt, device=device)
    return merger, suite_of(merger, folder, overrides, merger.task_names)


def _extended(
    folder: Path, overrides: Mapping[str, Any], adapt: Mapping[str, Any] | None, shard: Shard
) -> tuple[Merger | StreamedMerger, Suite | None]:
    """The same, to merge more into; where that can go tensor by tensor, no model is loaded."""
    saved = opened(folder, adapt=adapt)
    if (overrides.get("suite") or saved.manifest["metadata"].get("suite")) is None and _streams(saved):
        merger = StreamedMerger.from_pretrained(folder, adapt)
        return merger, suite_of(merger, folder, overrides, merger.task_names)
    return _reopen(folder, overrides, adapt, devices.usual(), _kind_of(folder, shard, more=1))


def _kind_of(folder: Path, shard: Shard, more: int = 0) -> type[Merger]:
    """What goes on with a saved merge in memory, all of it or shared out.

    Args:
        folder: of the merge.
        shard: see `mingle.runs.sharding`.
        more: how many tasks arrive.
    """
    if shard == "never":
        return Merger
    saved = Saved(folder, read_manifest(folder))
    base, merge = saved.base_folder(), saved.manifest
    check_known(merge, folder / MANIFEST)
    try:
        fitted = room.fitted_to(merge["method"], merge["options"], base, tasks.get(merge["task_type"]))
    except ValueError:  # options that do not suit the base, of which the merger tells
        return Merger
    memory = room.in_memory(fitted, room.of_method(fitted, base), len(merge["tasks"]) + more)
    arriving = memory.pop("fine-tuned model") + memory.pop("its teacher", 0)
    taken = sum(memory.values()) + (arriving if more else 0)
    return ShardedMerger if sharding.decided(shard, fitted, taken) else Merger


def suite_of(
    merger: Merger | StreamedMerger, folder: Path, overrides: Mapping[str, Any], names: Sequence[str]
) -> Suite | None:
    """A merged model's suite, its samples of these tasks checked, once the changes are in the metadata."""
    pooled_over_batch = getattr(merger.options, "reduce", None) == PROTOCOLS["official"]
    protocol = "official" if pooled_over_batch else "strict"
    merger.metadata = origin(protocol=protocol) | merger.metadata | dict(overrides)
    check_origin(merger.metadata, folder)
    if merger.metadata["suite"] is None:
        return None
    if pooled_over_batch and merger.metadata["protocol"] == "strict":
        raise OptionError(f"{folder}: was merged with batch gates, which the strict protocol does not allow")
    suite = suites.load(
        merger.metadata["suite"],
        base=merger.base_folder,
        protocol=merger.metadata["protocol"],
        samples_per_class=merger.metadata["samples_per_class"],
        seed=merger.seed,
        revisions=merger.metadata["revisions"],
    )
    suite.check_task_type(merger.task.name, merger.base_folder)
    for name in names:
        if name not in suite:
            raise OptionError(f"suite {suite.name!r} has no samples of the merged task {name!r}")
        suite.check(name)
    return suite
