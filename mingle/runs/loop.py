"""The loop behind every command that merges: one task after another into a merger, measured as it goes."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mingle.adaptation.trace import AdaptTrace
from mingle.merging.merger import Merger
from mingle.merging.parts import telling
from mingle.merging.streamed import NewModel, StreamedMerger
from mingle.runs import inputs
from mingle.runs.observer import Observer
from mingle.suites import Suite

#: options of glibc's mallopt: their numbers, and bytes.  Tensors of over 32 MiB, the most that can be set, go
#: back to the system as soon as they are freed; of the room of smaller ones that much is kept
_MALLOPT = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 128 << 20)}
#: a task and the names of those before it → the folder of its fine-tuned model
FindExpert = Callable[[str, Sequence[str]], Path]
#: ``every``: measure all merged tasks after each merge.  ``ends``: the newest task after each merge, and all
#: tasks after the last, which ACC and BWT need.  ``last``: all tasks, after the last merge only.
Evaluate = Literal["every", "ends", "last"]


@dataclass(frozen=True)
class MergeStep:
    """The cost and course of merging one task.

    Attributes:
        task: the task's name.
        merge, evaluate: seconds; of tasks that are merged together, each has its share.
        trace: the adaptation's course, or None.
    """

    task: str
    merge: float
    evaluate: float
    trace: AdaptTrace | None


def experts_of(suite: Suite, *, sequential: bool) -> FindExpert:
    """Finds the suite's own models; for a sequential method each is fine-tuned from the one before."""
    return lambda name, before: suite.expert(name, before if sequential else ())


def merge_all(
    merger: Merger,
    order: Sequence[str],
    expert: FindExpert,
    suite: Suite | None,
    observer: Observer,
    number: int = 0,
    *,
    evaluate: Evaluate = "every",
) -> Iterator[MergeStep]:
    """Merge those tasks of the order that are not merged yet; yields after each, when it is time to save.

    Args:
        merger: has a `mingle.runs.origin` as its metadata; its merged tasks are the beginning of the order.
        order: the tasks' names.
        expert: finds their fine-tuned models.
        suite: their samples; None for a method that needs none, whose result is then not measured.
        observer: told how the merge is getting on.
        number: of the order among several.
        evaluate: what is measured, and when.
    """
    for index in range(len(merger.merged), len(order)):
        name, last = order[index], index + 1 == len(order)
        observer.merging(merger.method.name, number, index, order)
        seeds = None
        if suite is not None:
            seeds = suite.seeds(name, whole=merger.method.sequential)
        model = expert(name, order[:index])
        began = time.perf_counter()
        report = merger.add(name, model, seeds, on_step=observer.adapting)
        merged = time.perf_counter() - report.calibration
        if suite is not None and merger.method.needs_seeds and (short := suite.shortage(name)):
            merger.merged[-1].notes.append(short)
        if suite is not None and (last or evaluate != "last"):
            _measure(merger, suite, everything=last or evaluate == "every", last=last)
        yield MergeStep(name, round(merged - began, 3), round(time.perf_counter() - merged, 3), report.trace)


def _measure(merger: Merger, suite: Suite, *, everything: bool, last: bool) -> None:
    """Measure the newest task, or everything; but of what a method never changes, once is enough.

    Whether tasks are found among all others is another matter, which counts after the last merge.
    """
    method, size, newest = merger.method, merger.metadata["batch_size"], merger.task_names[-1:]
    before = merger.matrix[-2] if len(merger.matrix) > 1 else []
    known = not method.interferes and None not in before and not (last and not method.per_task)
    merger.evaluate(suite, size, newest if known or not everything else None)
    if known and everything:
        merger.matrix[-1][:-1] = before


def stream_all(
    merger: StreamedMerger,
    order: Sequence[str],
    expert: FindExpert,
    folder: Path,
    observer: Observer,
    number: int = 0,
    *,
    keep: int | None = None,
) -> Iterator[MergeStep]:
    """Merge those tasks of the order that are not merged yet, from folders to the merger's folder.

    Args:
        merger, order, expert, observer, number: see `merge_all`.
        folder: the merger's, where every task is saved as soon as it is merged.
        keep: see `mingle.Merger.save_pretrained`.  With 1, where no merge but the last would be there in the
            end, all tasks are merged in one pass if the method can.
    """
    _settle_memory()
    left = len(order) - len(merger.merged)
    together = left if keep == 1 and left and merger.in_one_pass(left) else 1
    for index in range(len(merger.merged), len(order), together):
        names = order[index : index + together]
        models = []
        for place, name in enumerate(names, index):
            observer.merging(merger.method.name, number, place, order)
            model = expert(name, order[:place])
            inputs.note(merger.metadata, name, model)
            models.append(NewModel(name, model, merger.metadata[inputs.INPUTS][name]["model"]))
        began = time.perf_counter()
        with telling(observer.streaming):
            merger.add_all(models, folder, keep=keep)
        seconds = (time.perf_counter() - began) / together
        for name in names:
            yield MergeStep(name, round(seconds, 3), 0.0, None)


def _settle_memory() -> None:
    """Have the C library give freed memory back to the system where it is much, and else keep it.

    By itself glibc decides by what was freed last.  A new block of memory has to be cleared by the system
    page by page, which takes longer than what is computed in it: blocks of rows go into the same room again.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for number, size in _MALLOPT.values():
            mallopt(number, size)
