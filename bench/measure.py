"""One case, all peers: correctness first, then times taken in turns, memory, and what the times mean."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mingle.bench import check, floor, inputs, machine
from mingle.bench.floor import Ceilings
from mingle.bench.peers import OURS, STRATEGIES
from mingle.bench.peers.peer import Peer, Step, Unavailable
from mingle.bench.registry import Case

_log = logging.getLogger(__name__)

#: `backend="auto"` should be within this factor of the best strategy
DISPATCH_LIMIT = 1.10
_FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 100


def measure(
    case: Case,
    peers: Sequence[Peer],
    device: torch.device,
    limits: Ceilings,
    *,
    seconds: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything about one case as plain data; `seconds` bounds the time of the timing rounds.

    A peer's ``status`` is ``ok``, ``bound`` (another function, not compared), ``wrong`` (with ``errors``, and
    without times), ``unavailable`` or ``failed`` (with ``reason``).
    """
    case_inputs = inputs.make(case, device, seed)
    oracles = {id(case_inputs): check.Oracle(case_inputs, seed)}
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for peer in peers:
        found[peer.name] = result = {"status": "failed", "note": peer.note}
        try:
            adapted = peer.adapt(case_inputs)
            run = peer.build(adapted)
            if id(adapted) not in oracles:
                oracles[id(adapted)] = check.Oracle(adapted, seed)
            result |= _verdict(peer, run, oracles[id(adapted)])
            if result["status"] in ("ok", "bound"):
                result["peak_bytes"] = None if peer.captured else peak_bytes(run, device)
                steps[peer.name] = run
        except Unavailable as reason:
            result |= {"status": "unavailable", "reason": str(reason)}
        except Exception as error:  # one peer's failure is a result, and must not take the others along
            _log.warning("%s: %s failed", case.name, peer.name, exc_info=error)
            result |= {"reason": f"{type(error).__name__}: {error}"}
    load = machine.Load()
    times = interleaved(steps, device, seconds, seed)
    others = load.others()
    needed, (least, bound) = floor.count(case), floor.floor(case, limits)
    for name, series in times.items():
        fraction = (
            least / statistics.median(series) if found[name]["status"] == "ok" else None
        )  # bounds do less work
        found[name] |= summary(series) | {"floor_fraction": fraction}
        if OURS in times:
            found[name] |= relative(series, times[OURS])
    return {
        "case": asdict(case),
        "count": asdict(needed),
        "floor": {"seconds": least, "bound": bound},
        "checked_samples": oracles[id(case_inputs)].samples,
        "peers": found,
        "dispatch": dispatch(found),
        "cpus_used_by_others": others,
    }


def _verdict(peer: Peer, run: Step, oracle: check.Oracle) -> dict[str, Any]:
    """Status and errors of one peer, from the outputs of one call."""
    case = oracle.inputs.case
    if not peer.same(case):
        run()
        return {"status": "bound", "errors": None}
    errors = oracle.errors(run)
    limit = check.tolerance(oracle.inputs.x.dtype, oracle.inputs.x.device)
    wrong = {name: error for name, error in errors.items() if error > limit}
    finite = {
        name: error if error < float("inf") else None for name, error in errors.items()
    }  # JSON knows no infinity
    if not wrong:
        return {"status": "ok", "errors": finite, "tolerance": limit}
    reason = "; ".join(f"{name} is off by {error:.1e}, allowed {limit:.1e}" for name, error in wrong.items())
    _log.warning("%s: %s is WRONG: %s", case.name, peer.name, reason)
    return {"status": "wrong", "errors": finite, "tolerance": limit, "reason": reason}


def interleaved(
    steps: Mapping[str, Step], device: torch.device, seconds: float, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of every step in every round; a round calls each step once, in an order of its own, so that
    noise hits all alike.

    GPU times are between CUDA events, after a write that evicts the L2 cache and gives the host time to
    enqueue the launches.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(seed).shuffle
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    with _no_collection():
        for run in steps.values():
            run()  # warm-up, beyond what building and checking did
        began, rounds = time.perf_counter(), 0
        while (
            steps
            and rounds < _MOST_ROUNDS
            and (rounds < _FEWEST_ROUNDS or time.perf_counter() - began < seconds)
        ):
            shuffle(order)
            for name, taken in _round(steps, order, flush).items():
                times[name].append(taken)
            rounds += 1
    return times


def _round(steps: Mapping[str, Step], order: Sequence[str], flush: torch.Tensor | None) -> dict[str, float]:
    taken = {}
    if flush is None:
        for name in order:
            start = time.perf_counter()
            steps[name]()
            taken[name] = time.perf_counter() - start
        return taken
    events = {
        name: (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for name in order
    }
    for name in order:
        flush.zero_()
        events[name][0].record()
        steps[name]()
        events[name][1].record()
    torch.cuda.synchronize(flush.device)
    return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_bytes(run: Step, device: torch.device) -> int | None:
    """The most memory that one call holds beyond what was allocated before it, outputs included.

    On CPUs this is what PyTorch's allocator hands out, from the profiler's record of it; workspaces inside
    MKL and oneDNN do not show.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it announces every start and stop on stderr
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profiler:
            outputs = run()
        records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]
    except (AttributeError, RuntimeError):  # not public API
        return None
    del outputs
    held = most = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


def summary(series: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, count and all of the times in seconds."""
    low, high = percentiles(series)
    return {
        "median": statistics.median(series),
        "p20": low,
        "p80": high,
        "repetitions": len(series),
        "seconds": list(series),
    }


def relative(series: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How many times as long as ours: by the medians, and per round, which is what drift of the machine does
    not touch.
    """
    ratios = [theirs / own for theirs, own in zip(series, ours, strict=True)]
    low, high = percentiles(ratios)
    return {
        "ratio": statistics.median(series) / statistics.median(ours),
        "round_ratio": statistics.median(ratios),
        "round_ratio_p20": low,
        "round_ratio_p80": high,
    }


def percentiles(series: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th."""
    cuts = statistics.quantiles(series, n=5, method="inclusive") if len(series) > 1 else [series[0]] * 4
    return cuts[0], cuts[3]


def dispatch(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Whether `backend="auto"` was about as fast as the best strategy; None where there is nothing to
    compare.
    """
    timed = {
        name: found[name]["round_ratio"]
        for name in STRATEGIES
        if name != OURS and "round_ratio" in found.get(name, {})
    }
    if not timed:
        return None
    best = min(timed, key=timed.__getitem__)
    return {
        "best": best,
        "auto_over_best": 1 / timed[best],
        "within_limit": 1 / timed[best] <= DISPATCH_LIMIT,
    }
