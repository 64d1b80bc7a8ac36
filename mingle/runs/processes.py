"""Jobs of one run side by side: small models are merged faster in one process per core than by all cores."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

import torch

from mingle.adaptation.trace import StepProgress
from mingle.merging.evaluate import Result
from mingle.runs.observer import Observer

Context = TypeVar("Context")
Job = TypeVar("Job")
Found = TypeVar("Found")
#: seconds between two looks at what the jobs tell
_PAUSE = 0.1


def side_by_side(
    jobs: Sequence[Job],
    work: Callable[[Context, Job, Observer], Found],
    context: Context,
    prepare: Callable[[], Context],
    observer: Observer,
    processes: int,
    long: Callable[[Job], bool] = lambda job: False,
) -> Iterator[Found]:
    """What every job finds, in order, each as soon as those before it are there.

    The first job is done here, with nothing beside it, so that something is found soon; then other processes
    share the threads that PyTorch has here.

    Args:
        jobs: what to do.
        work: does it; like all that it is given and returns, it can be pickled.
        context: for jobs in this process.
        prepare: makes the context in another process.
        observer: told how the jobs are getting on; of jobs side by side it hears in turn.
        processes: at most so many work at the same time; with one, all jobs are done here.
        long: whether a job is among those that take longest, which others begin with: none of them is left
            over at the end, when there is nothing beside it.
    """
    if jobs:
        yield work(context, jobs[0], observer)
    left, threads = jobs[1:], torch.get_num_threads()
    others = min(len(left), processes, threads)
    if others < 2:
        for job in left:
            yield work(context, job, observer)
        return
    spawn, each = multiprocessing.get_context("spawn"), threads // others
    told, stop = spawn.Queue(), spawn.Event()
    with ProcessPoolExecutor(others, spawn, _begin, (prepare, each, told, stop)) as pool:
        try:
            handed_out = sorted(range(len(left)), key=lambda place: not long(left[place]))
            waiting = {place: pool.submit(_run, work, left[place]) for place in handed_out}
            for place in range(len(left)):
                _relay(told, observer, waiting[place])
                yield waiting[place].result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _relay(told: Any, observer: Observer, future: Future[Any]) -> None:
    """Tell the observer what jobs tell, until this one is done and a moment after."""
    end = math.inf
    while time.monotonic() < end:
        if math.isinf(end) and future.done():
            end = time.monotonic() + _PAUSE
        with contextlib.suppress(queue.Empty):
            name, given = told.get(timeout=_PAUSE)
            getattr(observer, name)(*given)


class _Stopped(BaseException):
    """Nobody wants the results any more."""


class _Telling(Observer):
    """Passes on what it is told to the process that started this one."""

    def __init__(self, told: Any, stop: Event) -> None:
        self.told, self.stop = told, stop

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        self._tell("merging", method, order, index, list(tasks))

    def adapting(self, progress: StepProgress) -> None:
        self._tell("adapting", progress)

    def training(self, task: str, step: int, steps: int) -> None:
        self._tell("training", task, step, steps)

    def merged(self, method: str, order: int, result: Result) -> None:
        self._tell("merged", method, order, result)

    def _tell(self, name: str, *given: Any) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.told.put((name, given))


#: of a process that works for another: the context, and its observer
_mine: tuple[Any, Observer]


def _begin(prepare: Callable[[], Any], threads: int, told: Any, stop: Event) -> None:
    global _mine
    told.cancel_join_thread()  # this process may end with words that nobody hears any more
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    torch.set_num_threads(threads)
    _mine = prepare(), _Telling(told, stop)


def _run(work: Callable[[Any, Any, Observer], Any], job: Any) -> Any:
    context, observer = _mine
    with contextlib.suppress(_Stopped):
        return work(context, job, observer)
