"""A fine-tuned model that arrives: what of it is merged, and that nothing is left of one that is refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mingle import ranks
from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.adaptation.trace import StepProgress
from mingle.io.hub import ModelName
from mingle.merging.calibration import temperature
from mingle.merging.finetuned import FineTuned, Model, of_tasks
from mingle.merging.finite import refuse_non_finite
from mingle.merging.merged_task import MergedTask, own_head
from mingle.merging.state import MergeState, model_name
from mingle.methods import Arrival, StepReport
from mingle.tasks import TaskData
from mingle.tasks.heads import head_of, put_head
from mingle.tasks.image_settings import differing_preparation
from mingle.tasks.shares import of_all, own_batches

logger = logging.getLogger(__name__)


def add(
    merge: MergeState,
    name: str,
    finetuned_model: Model,
    seed_data: TaskData | Mapping[str, Any] | None,
    on_step: Callable[[StepProgress], None] | None,
) -> StepReport:
    """Take a fine-tuned model into a merge, see `mingle.Merger.add`."""
    method = merge.method
    with ranks.together(f"reading the model of task {name!r}"):
        merge.check_name(name)
        samples = None if seed_data is None else merge.task.samples(merge.model, seed_data)
        seeds = samples if method.needs_seeds else None
        if method.requires_seeds() and not seeds:
            raise ValueError(f"task {name!r}: method {method.name!r} needs seed samples, and none were given")
        with of_tasks(name):
            model = FineTuned(finetuned_model, merge.base, merge.task, merge.vocabulary, merge.base_folder)
            tuned, head = merge.tuned_tensors(model), model.head(merge.values)
            left = model.left(method.merges(), merge.values)
            left += _prepared_otherwise(merge, finetuned_model)
            own = own_head(head, samples, model.labels)
            merge.task.check_head(own)
        index = len(merge.merged)
        teacher = partial(merge.teacher, tuned, head)
        if seeds is not None and method.needs_answers:
            seeds = merge.task.prepared(teacher, seeds)
    arrival = Arrival(
        index=index,
        name=name,
        tuned=tuned,
        seeds=seeds,
        teacher=teacher,
        seed=merge.step_seed(),
        on_step=on_step,
    )
    before = merge.restorable()
    served = head_of(merge.model, head)
    put_head(merge.model, head)
    merged = False
    try:
        with ranks.together(f"merging task {name!r}"):
            report = method.add(arrival)
            merged = True
            refuse_non_finite(method, name, [method.task_tensors(index)])
            began = time.perf_counter()
            degree = None if samples is None else _temperature(merge, samples, teacher)
            report.calibration = time.perf_counter() - began
    except BaseException:
        if merged and before is not None:  # else the method is as it was
            restored = before()
            merge._begin(type(method))
            merge.method.restore(*restored)
        put_head(merge.model, served)
        raise
    for line in left:
        logger.info("%s: %s", name, line)
    report.notes += left
    count = len(seeds) if seeds else 0
    labels = None if own.labels is None else list(own.labels)
    shared = dict(own.shared)
    called = ModelName() if isinstance(finetuned_model, Mapping) else model_name(finetuned_model)
    merge.merged.append(
        MergedTask(name, count, report.skipped, report.notes, labels, degree, called, head, shared)
    )
    merge.matrix.append([None] * len(merge.merged))
    merge.unknown.append([None] * len(merge.merged))
    merge.answers = {}
    merge._put_head(index)
    return report


@torch.no_grad()
def _temperature(merge: MergeState, samples: TaskData, teacher: Callable[[], nn.Module]) -> float | None:
    """The temperature of the task whose head is in the model; None where answers are not classes."""
    if not samples or not merge.task.one_class or merge.method.per_task:
        return None
    parts = [
        of_all(
            [
                merge.task.logits(model, batch).float().cpu()
                for batch in own_batches(merge.model, samples, TEACHER_BATCH)
            ]
        )
        for model in (merge.model, teacher())
    ]
    found, wanted = map(torch.cat, parts)
    return temperature(found, wanted) if found.dim() == 2 else None


def _prepared_otherwise(merge: MergeState, model: Model) -> list[str]:
    if merge.base_folder is None or isinstance(model, nn.Module | Mapping):
        return []
    return differing_preparation(merge.base_folder, Path(model))
