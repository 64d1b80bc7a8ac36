"""Jobs of one run side by side: small models are merged faster in one process per core than by all cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing.context import SpawnContext
from typing import Any, TypeVar

import torch

from mingle.adaptation.trace import StepProgress
from mingle.merging.evaluate import Result
from mingle.merging.parts import PartsProgress
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
    """What every job finds, in order, each as soon as those before it are there and this process is free.

    The first job is done here, with nothing beside it, so that something is found soon; then other processes
    join in, and all of them share the threads that PyTorch has here.

    Args:
        jobs: what to do.
        work: does it; like all that it is given and returns, it can be pickled.
        context: for jobs in this process.
        prepare: makes the context in another process.
        observer: told how the jobs are getting on; of jobs side by side it hears in turn, in another thread.
        processes: at most so many work at the same time; with one, all jobs are done here.
        long: whether a job is among those that take longest, which all begin with: none of them is left
            over at the end, when there is nothing beside it.
    """
    if jobs:
        yield work(context, jobs[0], observer)
    left, threads = jobs[1:], torch.get_num_threads()
    workers = min(len(left), processes, threads)
    if workers < 2:
        for job in left:
            yield work(context, job, observer)
        return
    spawn, each = multiprocessing.get_context("spawn"), threads // workers
    telling, ended = _Telling(spawn), threading.Event()
    places = _Places(spawn, sorted(range(len(left)), key=lambda place: not long(left[place])))
    torch.set_num_threads(each)
    with (
        ThreadPoolExecutor(1) as thread,
        ProcessPoolExecutor(workers - 1, spawn, _begin, (prepare, each, telling, places)) as pool,
    ):
        relaying = thread.submit(telling.relay, observer, ended)
        others = [pool.submit(_next, work, left) for _ in left]
        everything: list[Future[Any]] = [relaying, *others]
        for future in everything:
            future.add_done_callback(telling.stop_after_error)
        found: dict[int, Found] = {}
        waiting = set(others)
        try:
            for place in range(len(left)):
                while place not in found:
                    mine = places.next()
                    if mine is not None:
                        with contextlib.suppress(_Stopped):
                            found[mine] = work(context, left[mine], telling)
                    done, waiting = wait(waiting, None if mine is None else 0, FIRST_COMPLETED)
                    for future in everything if telling.stopped() else done:
                        if future.done():
                            found.update(future.result())
                yield found[place]
            ended.set()
            relaying.result()
        finally:
            torch.set_num_threads(threads)
            telling.stop()
            ended.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(BaseException):
    """Nobody wants the results any more."""


class _Telling(Observer):
    """Passes on what it is told, in whichever process, to an observer in the process that made it."""

    def __init__(self, context: SpawnContext) -> None:
        self._told, self._stop = context.Queue(), context.Event()

    def merging(self, method: str, order: int, index: int, tasks: Sequence[str]) -> None:
        self._tell("merging", method, order, index, list(tasks))

    def adapting(self, progress: StepProgress) -> None:
        self._tell("adapting", progress)

    def streaming(self, progress: PartsProgress) -> None:
        self._tell("streaming", progress)

    def training(self, task: str, step: int, steps: int) -> None:
        self._tell("training", task, step, steps)

    def merged(self, method: str, order: int, result: Result) -> None:
        self._tell("merged", method, order, result)

    def relay(self, observer: Observer, ended: threading.Event) -> None:
        """Tell the observer what was told, until the end and a moment after."""
        while True:
            last = ended.is_set()
            try:
                name, given = self._told.get(timeout=_PAUSE)
            except queue.Empty:
                if last:
                    return
            else:
                getattr(observer, name)(*given)

    def stop(self) -> None:
        """Raise `_Stopped` in whoever tells something from now on."""
        self._stop.set()

    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop_after_error(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self.stop()

    def _tell(self, name: str, *given: Any) -> None:
        if self.stopped():
            raise _Stopped
        self._told.cancel_join_thread()  # a process may end with words that nobody hears any more
        self._told.put((name, given))


class _Places:
    """Hands out the places of jobs, each to one of several processes."""

    def __init__(self, context: SpawnContext, places: Sequence[int]) -> None:
        self._places, self._taken = list(places), context.Value("i", 0)

    def next(self) -> int | None:
        """One that nobody has yet; None where all are handed out."""
        with self._taken.get_lock():
            index = self._taken.value
            self._taken.value = min(index + 1, len(self._places))
        return self._places[index] if index < len(self._places) else None


#: of a process that works for another: the context, its observer and the jobs' places
_mine: tuple[Any, _Telling, _Places]


def _begin(prepare: Callable[[], Any], threads: int, telling: _Telling, places: _Places) -> None:
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    torch.set_num_threads(threads)
    _mine = prepare(), telling, places


def _next(work: Callable[[Any, Job, Observer], Found], jobs: Sequence[Job]) -> dict[int, Found]:
    """What the next job found, under its place; empty where there is none."""
    context, telling, places = _mine
    place = places.next()
    if place is not None:
        with contextlib.suppress(_Stopped):
            return {place: work(context, jobs[place], telling)}
    return {}
