"""Merges that live in folders: check everything a config names, merge with a save after every task, resume,
extend, evaluate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mingle import methods, suites, tasks
from mingle.io import hub
from mingle.io import merger_folder
from mingle.runs.config import Config, Expert, shuffled
from mingle.merging.evaluate import Result
from mingle.runs.compare import Observer, origin
from mingle.io.files import CheckpointError
from mingle.merging.finetuned import check_tower
from mingle.merging.merger import Merger
from mingle.options import OptionError, build
from mingle.suites import Suite
from mingle.suites.protocol import PROTOCOLS
from mingle.io.state_dicts import IncompatibleModel, first_names
from mingle.tasks import TaskType


@dataclass(frozen=True)
class Plan:
    """A config whose every file was found to fit, ready to run.

    Attributes:
        config: what was asked for.
        task: the base model's task type.
        suite: its samples, or None for methods without data and without evaluation.
        base: the base model's folder.
        experts: name → folder of the fine-tuned model, or of its LoRA adapter.
        orders: the task orders to merge in.
        folders: where each order's merged model goes; empty for a plan that was only to be checked.
        revisions: of what comes from the hub, the commits in use; they are saved with the merged model.
    """

    config: Config
    task: TaskType
    suite: Suite | None
    base: Path
    experts: Mapping[str, Path]
    orders: list[list[str]]
    folders: list[Path]
    revisions: hub.Revisions

    def run(self, observer: Observer | None = None) -> Iterator[Result]:
        """Merge in every order, saving after each task; what a former run has merged is kept.  Yields each
        order's result.
        """
        observer = observer or Observer()
        for number, (order, folder) in enumerate(zip(self.orders, self.folders, strict=True)):
            merger = self._start(folder)
            for index in range(len(merger.merged), len(order)):
                observer.merging(self.config.method, number, index, order)
                last = index + 1 == len(order)
                _merge_one(merger, order[index], self.experts[order[index]], self.suite, self.config.eval.every_step or last, observer)
                merger.save_pretrained(folder)
            result = merger.result()
            observer.merged(self.config.method, number, result)
            yield result

    def _start(self, folder: Path) -> Merger:
        if (folder / merger_folder.MANIFEST).exists():
            merger = Merger.from_pretrained(folder)
            found = merger_folder.state_hash(merger.task.load(self.base))
            if found != merger_folder.state_hash(merger.base):
                raise CheckpointError(f"{folder}: was begun with another base model than {self.base}")
            merger.metadata["revisions"] = self.revisions
            return merger
        merger = Merger(self.base, self.config.method, self.task.name, **asdict(_options(self.config, self.task)))
        merger.metadata = _origin(self.config, self.revisions)
        return merger


def check(config: Config, out: Path | None = None) -> Plan:
    """Find everything that can be wrong with a merge into the folder `out` before the first heavy step.

    Raises:
        OptionError: something in the config.
        CheckpointError: a model that is missing, broken, or no fine-tuned version of the base; a folder in
            use for something else.
    """
    folders: list[Path] = []
    if out is not None:
        folders = [out / f"order-{seed}" for seed in config.order.seeds] if config.order.shuffle and len(config.order.seeds) > 1 else [out]
    revisions = _revisions(config, folders)
    base = hub.resolve(config.base, None, revisions)
    task = tasks.of(base)
    model = task.skeleton(base)
    tower = model.get_submodule(task.tower)
    experts = {expert.name: hub.resolve(expert.model, expert.revision, revisions) for expert in config.experts}
    shapes, first = tower.state_dict(), first_names(tower)
    for name, folder in experts.items():
        try:
            check_tower(folder, shapes, first, task.prefixes)
        except IncompatibleModel as error:
            raise IncompatibleModel(f"expert {name!r} ({folder}): {error}") from None
    try:
        # fits the method's layers to the model's
        methods.get(config.method)(model, task, shapes, _options(config, task))
    except ValueError as error:
        raise OptionError(f"method {config.method!r}: {error}") from None
    suite = _suite(config, task, base, experts, revisions)
    names = list(experts)
    orders = [shuffled(names, seed) for seed in config.order.seeds] if config.order.shuffle else [names]
    for folder, order in zip(folders, orders, strict=bool(folders)):
        _check_folder(folder, config, task, order)
    return Plan(config, task, suite, base, experts, orders, folders, revisions)


def _revisions(config: Config, folders: list[Path]) -> dict[str, str]:
    """The commits that the config names, and those that the beginnings of this merge have noted."""
    revisions = dict(config.revisions)
    for folder in folders:
        if (folder / merger_folder.MANIFEST).exists():
            for repo, noted in merger_folder.load(folder).manifest["metadata"].get("revisions", {}).items():
                if revisions.setdefault(repo, noted) != noted:
                    raise CheckpointError(f"{folder}: was begun with {repo} at commit {noted}, not {revisions[repo]}")
    return revisions


def _suite(config: Config, task: TaskType, base: Path, experts: Mapping[str, Path], revisions: hub.Revisions) -> Suite | None:
    if config.eval.suite is None:
        if methods.get(config.method).needs_seeds:
            raise OptionError(f"eval: suite is missing: method {config.method!r} adapts on seed samples, which come from a suite")
        return None
    suite = suites.load(
        config.eval.suite,
        base=base,
        protocol=config.adapt.protocol,
        samples_per_class=config.adapt.samples_per_class,
        revisions=revisions,
    )
    _check_kind(suite, task, base)
    unknown = [name for name in experts if name not in suite]
    if unknown:
        raise OptionError(f"experts: suite {suite.name!r} has no task {unknown[0]!r}; it has {', '.join(suite)}")
    for name in experts:
        suite.check(name)
    return suite


def _check_kind(suite: Suite, task: TaskType, base: Path | None) -> None:
    """Refuse samples that the model cannot take."""
    if suite.task_type != task.name:
        raise OptionError(f"suite {suite.name!r} is for {suite.task_type} models, but {base or 'the base'} is a {task.name} model")


def _check_folder(folder: Path, config: Config, task: TaskType, order: list[str]) -> None:
    """Refuse a folder that holds something else than the beginning of this very merge."""
    if not folder.exists():
        return
    if not (folder / merger_folder.MANIFEST).exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise CheckpointError(f"{folder}: not empty, and not a merge that could be resumed")
        return
    manifest = merger_folder.load(folder).manifest
    options = asdict(_options(config, task))
    noted = manifest["metadata"].get("revisions", {})  # compared when they were read
    wanted: dict[str, Any] = {"method": config.method, "metadata": _origin(config, noted)} | {f"option {k}": v for k, v in options.items()}
    found: dict[str, Any] = {"method": manifest["method"], "metadata": manifest["metadata"] | {"revisions": noted}} | {
        f"option {k}": tuple(v) if isinstance(v, list) else v for k, v in manifest["options"].items()
    }
    differing = [f"{key}: {found.get(key)!r} there, {value!r} now" for key, value in wanted.items() if found.get(key) != value]
    merged = [task["name"] for task in manifest["tasks"]]
    if merged != order[: len(merged)]:
        differing.append(f"tasks: {', '.join(merged)} there, the order is now {', '.join(order)}")
    if differing:
        raise CheckpointError(f"{folder}: holds another merge, which this one cannot resume; {'; '.join(differing)}")


def _options(config: Config, task: TaskType) -> Any:
    """The method's published settings for so many tasks, and over them what the config says."""
    given = methods.published(config.method, task.name, len(config.experts)) | config.method_options()
    return build(methods.get(config.method).Options, given, "options")


def _origin(config: Config, revisions: hub.Revisions) -> dict[str, Any]:
    """What `add` and `evaluate` need to go on as the merge began."""
    return origin(config.eval.suite, config.adapt.protocol, config.adapt.samples_per_class, config.eval.batch_size, revisions)


def _merge_one(merger: Merger, name: str, model: Path, suite: Suite | None, evaluate: bool, observer: Observer) -> None:
    method = merger.method
    seeds = suite.seeds(name, whole=method.sequential) if suite is not None and method.needs_seeds else None
    merger.add(name, model, seeds, on_step=observer.adapting)
    if suite is not None and evaluate:
        merger.evaluate(suite, merger.metadata["batch_size"])


def _reopen(folder: Path, overrides: Mapping[str, Any]) -> tuple[Merger, Suite | None]:
    """A merged model and its suite, with what the caller wants otherwise."""
    merger = Merger.from_pretrained(folder)
    pooled_over_batch = getattr(merger.options, "reduce", None) == PROTOCOLS["official"]
    merger.metadata = origin(protocol="official" if pooled_over_batch else "strict") | merger.metadata | dict(overrides)
    if merger.metadata["suite"] is None:
        return merger, None
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
    _check_kind(suite, merger.task, merger.base_folder)
    return merger, suite


def add(folder: Path, expert: Expert, overrides: Mapping[str, Any], observer: Observer | None = None) -> Result:
    """Merge one more model into a merged one, evaluate where there is a suite, and save."""
    observer = observer or Observer()
    merger, suite = _reopen(folder, overrides)
    if suite is not None and expert.name not in suite:
        raise OptionError(f"suite {suite.name!r} has no task {expert.name!r}; it has {', '.join(suite)}")
    model = hub.resolve(expert.model, expert.revision, merger.metadata["revisions"])
    if suite is not None:
        suite.check(expert.name)
    observer.merging(merger.method.name, 0, 0, [expert.name])
    _merge_one(merger, expert.name, model, suite, True, observer)
    merger.save_pretrained(folder)
    return merger.result()


def evaluate(folder: Path, overrides: Mapping[str, Any], batch_size: int) -> Result:
    """Accuracy of a merged model on all of its tasks; nothing is written."""
    merger, suite = _reopen(folder, overrides)
    if suite is None:
        raise OptionError("suite: name one; the merge was made without")
    return merger.evaluate(suite, batch_size)
