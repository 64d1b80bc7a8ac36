"""The processes of one torchrun, its ranks: who this one is, sums over all, and errors that all hear of.

A process alone is a group of one, for which every function here does what is right at once; so callers have
one code path.  A Python program that was started by torchrun is alone too until it enters `joined`.

An error ends the group: whoever fails first says so, and every other rank raises `OtherRankFailed`, in a
collective or wherever its main thread is.  What a rank that does not answer any more is taken for, and how
soon, is in `mingle.ranks.watch`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from mingle.ranks.watch import OtherRankFailed, Watch

__all__ = [
    "OtherRankFailed",
    "all_gather",
    "apart",
    "ask",
    "dealt",
    "gather",
    "joined",
    "launched",
    "offer",
    "rank",
    "shared",
    "size",
    "sum_",
    "together",
    "withdraw",
]

Thing = TypeVar("Thing")
#: what torchrun sets, and other launchers that PyTorch can be started by
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: seconds for all ranks to join, and for all to leave
JOIN, LEAVE = 300.0, 30.0
#: of a collective; that the others live is known from their signs, not from how long it takes
_FOREVER = timedelta(days=30)
#: seconds between two looks at whether the group is over, in a collective that PyTorch waits for
_SLICE = 1.0
#: of tensors; its name until PyTorch 2.12
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: what was joined; None in a process alone
_watch: Watch | None = None
#: how this rank takes part in what others ask for, by numbers that are the same on all ranks
_offers: dict[int, Callable[[], object]] = {}
_count = 0
#: asked for by a rank that is at a collective of all
_NOTHING = -1


def rank() -> int:
    """The number of this process in the group, from 0."""
    return 0 if _watch is None else _watch.rank


def size() -> int:
    """How many processes the group has."""
    return 1 if _watch is None else _watch.size


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun has started, if it has started this one, while the block lasts.

    The default process group of `torch.distributed` is there meanwhile: NCCL on GPUs, of which this process
    uses that of its local rank, and Gloo on CPUs, and where there are fewer GPUs than processes.

    Raises:
        ValueError: variables of torchrun of which some are missing or are not numbers.
        OtherRankFailed: another rank did not join, has failed, or has ended.
    """
    global _watch
    if _watch is not None or not launched():
        yield
        return
    watch = _watch = _join()
    with watch.told():
        try:
            yield
            gather(None)
        finally:
            _watch = None
            _offers.clear()
    watch.stop()
    dist.monitored_barrier(timeout=timedelta(seconds=LEAVE))
    dist.destroy_process_group()


def sum_(*tensors: Tensor) -> None:
    """Put the sum over all ranks into every tensor, in place; one message per dtype and device.

    All ranks give tensors of the same shapes, in the same order, and get the same bits.
    """
    if _watch is None:
        return
    _serve()
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for alike in kinds.values():
        whole = len(alike) == 1 and alike[0].is_contiguous()
        flat = alike[0] if whole else torch.cat([tensor.reshape(-1) for tensor in alike])
        with _watch.waiting():
            _finish(_watch, dist.all_reduce(flat, async_op=True))
        if not whole:
            parts = flat.split([tensor.numel() for tensor in alike])
            for tensor, part in zip(alike, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def gather(thing: Thing) -> list[Thing]:
    """What every rank gives, by rank; things that can be pickled."""
    if _watch is None:
        return [thing]
    _serve()
    found: list[Any] = [None] * _watch.size
    with _watch.waiting():
        _apart(_watch, lambda: dist.all_gather_object(found, thing))
    return found


def all_gather(whole: Tensor, part: Tensor) -> None:
    """Put the parts [k] of all ranks, one after another, into `whole` [n k]; all come here at once."""
    if _watch is None:
        whole.copy_(part)
        return
    with _watch.waiting():
        _finish(_watch, _all_gather(whole, part, async_op=True))


def offer(take_part: Callable[[], object]) -> int:
    """Let any rank `ask` for something that takes all of them; every rank offers it, at the same place.

    Args:
        take_part: what this rank does when another one asks.

    Returns:
        The offer's number, the same on all ranks.
    """
    global _count
    _count += 1
    _offers[_count] = take_part
    return _count


def withdraw(number: int) -> None:
    """Take an offer back, once all ranks have come to a `gather` after which none of them asks for it."""
    del _offers[number]


def ask(number: int, own: Callable[[], object]) -> None:
    """Do something that was offered; the others take part wherever they ask or wait for all ranks.

    So ranks need not ask for the same things, in the same order or as often.

    Args:
        number: of the offer.
        own: this rank's part in it.
    """
    asked = False
    while not asked:
        for wanted in _wanted(number):
            if wanted == number:
                own()
                asked = True
            else:
                _offers[wanted]()


def _serve() -> None:
    """Take part in what others ask for until all ranks are at a collective of all."""
    while _offers and (wanted := _wanted(_NOTHING)):
        for number in wanted:
            _offers[number]()


def _wanted(own: int) -> list[int]:
    """The numbers of what ranks ask for now, rising."""
    if _watch is None:
        return [own] if own != _NOTHING else []
    found = torch.empty(_watch.size, dtype=torch.int64)
    all_gather(found, torch.tensor([own]))
    return sorted(set(found.tolist()) - {_NOTHING})


@contextmanager
def together(what: str) -> Iterator[None]:
    """A block that all ranks go through, and none leaves before all have come to its end.

    Where it raises on any of them, it raises on all: on that rank its own error, on others `OtherRankFailed`,
    at once and wherever in the block they are.  No collective works after that.

    Args:
        what: is done, for the message: ``rank 1 on host b: writing the manifest: disk full``.
    """
    watch = _watch
    if watch is None:
        yield
        return
    try:
        yield
        gather(None)
    except BaseException as error:
        stopped = watch.stopped(error)
        watch.tell(error, what)
        if stopped is not None:
            raise stopped from None
        raise


@contextmanager
def apart() -> Iterator[None]:
    """A block in which this process works for itself, as if alone; it still hears of the others' ends."""
    global _watch
    watch, _watch = _watch, None
    try:
        yield
    finally:
        _watch = watch


def dealt(costs: Sequence[float]) -> list[list[int]]:
    """Jobs of these costs as they are dealt to ranks, the same on all: for every rank their places, rising.

    The largest goes first, each to the rank that has least so far; of equals the first to the first.
    """
    hands: list[list[int]] = [[] for _ in range(size())]
    loads = [0.0] * size()
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        least = min(range(size()), key=lambda number: (loads[number], len(hands[number]), number))
        hands[least].append(place)
        loads[least] += costs[place]
    return [sorted(hand) for hand in hands]


def shared(samples: int) -> slice:
    """This rank's share of that many samples, which follow one another; shares differ by one at most."""
    return slice(samples * rank() // size(), samples * (rank() + 1) // size())


def launched() -> bool:
    """Whether torchrun has started this process, or another launcher that sets its variables.

    Raises:
        ValueError: some of them are missing, or are not numbers.
    """
    given = [name for name in _VARIABLES if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return False
    for name in _VARIABLES:
        if name not in given:
            raise ValueError(f"{name} is not set, but {' and '.join(given)} are; start with torchrun")
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise ValueError(f"{name}={os.environ[name]!r} is not a number; start with torchrun")
    return True


def _join() -> Watch:
    number, count, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ["MASTER_ADDR"]
    # torchrun's agents keep the store of their own rendezvous for their processes
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # which may be that of several groups after one another
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        whole = TCPStore(
            host, port, count, not kept and number == 0, timedelta(seconds=JOIN), wait_for_workers=False
        )
        store = PrefixStore(f"mingle/{attempt}", whole)
        watch = Watch(store, number, count)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OtherRankFailed(f"rank {number}: cannot join the others at {host}:{port}: {reason}") from None
    with watch.told():
        watch.meet(JOIN)
        _start(watch, PrefixStore("group", store))
    return watch


def _start(watch: Watch, store: Store) -> None:
    """Make the default process group."""
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    nccl = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) and dist.is_nccl_available()
    if gpus:
        torch.cuda.set_device(local % gpus)
    backend = "cpu:gloo,cuda:nccl" if gpus and nccl else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=watch.rank, world_size=watch.size, timeout=_FOREVER
        )
    except RuntimeError as error:
        raise watch.reason(error) from error


def _finish(watch: Watch, work: Any) -> None:
    """Wait for a collective as long as all ranks live."""
    while True:
        try:
            work.wait(timedelta(seconds=_SLICE))
            return
        except RuntimeError as error:
            if work.is_completed():
                raise watch.reason(error) from error
            watch.check()


def _apart(watch: Watch, collective: Callable[[], object]) -> None:
    """The same for a collective that blocks, in a thread of its own."""
    over, errors = threading.Event(), []

    def run() -> None:
        try:
            collective()
        except BaseException as error:
            errors.append(error)
        over.set()

    threading.Thread(target=run, daemon=True).start()
    while not over.wait(_SLICE):
        watch.check()
    if errors:
        raise watch.reason(errors[0]) from errors[0]
