"""Everything that can be wrong with a merge, found before its first heavy step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from mingle import methods, ranks, suites, tasks
from mingle.io import hub
from mingle.io.files import CheckpointError, writable
from mingle.io.locks import refuse_locked
from mingle.io.manifest import MANIFEST, read_manifest
from mingle.io.state_dicts import IncompatibleModel
from mingle.kernels import gemm
from mingle.merging.finetuned import FineTuned
from mingle.merging.streamed import streams
from mingle.merging.vocabulary import Vocabulary
from mingle.methods import MergeMethod
from mingle.options import OptionError, build
from mingle.runs import forecast, settings, sharding, target
from mingle.runs.config import MergeConfig, load
from mingle.runs.merge import MergePlan
from mingle.runs.orders import shuffled
from mingle.runs.origin import check_origin
from mingle.suites import Suite
from mingle.tasks import TaskType
from mingle.tasks.image_settings import differing_preparation
from mingle.tasks.loading import ModelCheckpoint
from mingle.tasks.precision import dtype_of, put_into


def plan_of(file: Path, out: Path | None = None) -> MergePlan:
    """The plan of the merge that a YAML file describes, see `check`; its messages name the file."""
    config = load(file)
    try:
        return check(config, out)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from None


def check(config: MergeConfig, out: Path | None = None) -> MergePlan:
    """The plan of a merge into the folder `out`; None only checks.

    Raises:
        OptionError: the config asks for something that cannot be done.
        CheckpointError: a model that is missing or broken; a folder in use for something else, or without
            room.
        IncompatibleModel: a model that is not a fine-tuned version of the base.
    """
    gemm.library(1, 1, 1)  # refuses a $MINGLE_CPU_GEMM that it does not know
    folders = _folders(config, out)
    for folder in folders if ranks.rank() == 0 else []:  # others would see what that tries out
        refuse_locked(folder)
        writable(folder)
    revisions = _revisions(config, folders)
    base = hub.resolve(config.base, None, revisions)
    task = tasks.of(base) if config.task_type is None else tasks.get(config.task_type)
    model = put_into(task.skeleton(base), dtype_of(config.dtype))
    experts = {
        expert.name: hub.resolve(expert.model, expert.revision, revisions) for expert in config.experts
    }
    finetuned = _fine_tuned(experts, model, task, config.vocabulary, base)
    suite = _suite(config, task, base, experts, revisions)
    chosen = settings.sources(
        config.method,
        task_type=task.name,
        tasks=len(config.experts),
        protocol=config.adapt.protocol,
        suite=suite,
        given=config.method_options(),
    )
    options = {name: setting.value for name, setting in chosen.items()}
    method = _fitted(config.method, model, task, options)
    if suite is None and method.requires_seeds():
        need = f"method {config.method!r} needs seed samples, which come from a suite"
        off = "; with adapt: {steps: 0} it needs none either" if method.adapts_by_choice else ""
        others = ", ".join(methods.without_samples())
        raise OptionError(f"eval: suite is missing: {need}; {others} need none{off}")
    values = ModelCheckpoint(base, model)
    left = {
        name: expert.left(method.merges(), values) + differing_preparation(base, experts[name])
        for name, expert in finetuned.items()
    }
    if suite is not None:
        for name in experts:
            suite.check(name)
    names = list(experts)
    orders = [shuffled(names, seed) for seed in config.order.seeds] if config.order.shuffle else [names]
    plan = MergePlan(
        config=config,
        task=task,
        options=options,
        suite=suite,
        base=base,
        experts=experts,
        orders=orders,
        folders=folders,
        revisions=revisions,
        left={name: lines for name, lines in left.items() if lines},
        sources={name: setting.source for name, setting in chosen.items()},
        fitted=method,
    )
    merged = target.check(plan)
    if suite is None and streams(type(method), method.options, task, model):
        listed = [(experts[name], finetuned[name]) for name in orders[0]]
        of_merge = cache(partial(forecast.of_merge, method, base, listed))
        needs = target.in_files(lambda keep: of_merge(keep).disk, partial(forecast.of_step, method))
        target.check_room(plan, merged, needs)
        found = of_merge(config.keep)
        _refuse_memory(base, found.memory, forecast.available(), "its largest tensor decides")
        plan = replace(plan, forecast=found.times(len(orders)))
    else:
        target.check_room(plan, merged, target.in_memory(method, base, len(experts)))
        sharding.refuse_impossible(config.shard, method)
        memory = plan.memory()
        parts = ", ".join(f"{name} {part}" for name, part in memory.items())
        _refuse_memory(base, sum(memory.values()), sharding.there(), parts)
    return plan


def _refuse_memory(base: Path, taken: int, there: int, why: str) -> None:
    """Refuse a merge that this machine has too little memory for."""
    if taken > there:
        raise OptionError(f"{base}: merging takes {taken} bytes of memory, and there are {there}; {why}")


def _folders(config: MergeConfig, out: Path | None) -> list[Path]:
    """One folder per order for its merged model."""
    if out is None:
        return []
    several = config.order.shuffle and len(config.order.seeds) > 1
    return [out / f"order-{seed}" for seed in config.order.seeds] if several else [out]


def _revisions(config: MergeConfig, folders: list[Path]) -> dict[str, str]:
    """The commits that the config names, and those that earlier runs of this merge have noted."""
    revisions = dict(config.revisions)
    for folder in folders:
        if (folder / MANIFEST).exists():
            metadata = read_manifest(folder)["metadata"]
            check_origin(metadata, folder)
            noted = metadata.get("revisions", {})
            for repo, commit in noted.items():
                if revisions.setdefault(repo, commit) != commit:
                    raise CheckpointError(
                        f"{folder}: was started with {repo} at commit {commit}, not {revisions[repo]}"
                    )
    return revisions


def _fine_tuned(
    experts: Mapping[str, Path], model: nn.Module, task: TaskType, vocabulary: Vocabulary, base: Path
) -> dict[str, FineTuned]:
    """The experts beside the base, each found to be a fine-tuned version of it, mostly by its header."""
    found = {}
    for name, folder in experts.items():
        try:
            found[name] = FineTuned(folder, model, task, vocabulary, base)
        except IncompatibleModel as error:
            raise IncompatibleModel(f"expert {name!r} ({folder}): {error}") from None
    return found


def _fitted(method: str, model: nn.Module, task: TaskType, options: Mapping[str, Any]) -> MergeMethod:
    """The method, fitted to an empty model.

    Raises:
        OptionError: layers or depths that the model does not have.
    """
    chosen = methods.get(method)
    shapes = model.get_submodule(task.tower(model)).state_dict()
    try:
        return chosen(model, task, shapes, build(chosen.Options, options, "options"))
    except ValueError as error:
        raise OptionError(f"method {method!r}: {error}") from None


def _suite(
    config: MergeConfig, task: TaskType, base: Path, experts: Mapping[str, Path], revisions: hub.Revisions
) -> Suite | None:
    if config.eval.suite is None:
        return None
    suite = suites.load(
        config.eval.suite,
        base=base,
        protocol=config.adapt.protocol,
        samples_per_class=config.adapt.samples_per_class,
        revisions=revisions,
    )
    suite.check_task_type(task.name, base)
    unknown = [name for name in experts if name not in suite]
    if unknown:
        raise OptionError(
            f"experts: suite {suite.name!r} has no task {unknown[0]!r}; it has {', '.join(suite)}"
        )
    counted = suite.request.total is None  # where tasks are answered in words, the suite fixes the number
    if methods.get(config.method).needs_seeds and counted and config.adapt.samples_per_class == 0:
        need = f"method {config.method!r} needs seed samples"
        raise OptionError(f"adapt: samples_per_class is 0, and {need}")
    return suite
