"""One shape, everything that can compute it: correctness first, then times taken in turns."""

from __future__ import annotations

import gc
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mingle.bench import machine
from mingle.bench.decomposition import check
from mingle.bench.decomposition.cases import Problem
from mingle.bench.decomposition.peers import OURS, Peer
from mingle.bench.decomposition.pipelines import Pipeline
from mingle.bench.measure import relative, summary

_log = logging.getLogger(__name__)

#: what takes longer is not called again: the time is that of the call whose result was checked
SLOW = 4.0
_FEWEST, _MOST = 3, 40


@dataclass(frozen=True)
class Budget:
    """Seconds of timing per peer, and the moment of `time.monotonic` from which no further peer is begun."""

    seconds: float
    until: float = math.inf


def decompositions(problem: Problem, peers: Sequence[Peer], budget: Budget, seed: int = 0) -> dict[str, Any]:
    """Every peer on the problem's Δ; see `_compared`."""
    optima = check.optima(problem)

    def call(peer: Peer, part: Problem) -> Callable[[], Any]:
        return lambda: peer.run(part.deltas, part.rank)

    def errors(result: Any, part: Problem) -> dict[str, float]:
        return check.decomposition_errors(result, _of(optima, part), part.rank)

    found = _compared(problem, peers, call, errors, budget, seed)
    for peer in peers:
        curve, label = peer.curve or peer.method, peer.label or peer.setting
        found["peers"][peer.name] |= {
            "method": peer.method,
            "setting": peer.setting,
            "curve": curve,
            "label": label,
        }
    return found


def pipelines(
    problem: Problem, candidates: Sequence[Pipeline], budget: Budget, seed: int = 0
) -> dict[str, Any]:
    """Every pipeline from the problem's Δ and earlier experts to new experts; see `_compared`."""
    optima, ranks = check.projected_optima(problem)
    found = _compared(
        problem,
        candidates,
        lambda pipeline, part: lambda: pipeline.run(part),
        lambda result, part: check.expert_errors(result, _of(optima, part)),
        budget,
        seed,
    )
    for pipeline in candidates:
        found["peers"][pipeline.name]["note"] = pipeline.note
    return found | {"effective_ranks": list(ranks.values())}


def _of(optima: Mapping[int, check.Optimum], part: Problem) -> dict[int, check.Optimum]:
    return {i: optimum for i, optimum in optima.items() if i < part.layers}


def _compared(
    problem: Problem,
    candidates: Sequence[Any],
    call: Callable[[Any, Problem], Callable[[], Any]],
    errors: Callable[[Any, Problem], dict[str, float]],
    budget: Budget,
    seed: int,
) -> dict[str, Any]:
    """By name: a ``status`` of ``ok``, ``wrong``, ``failed`` or ``left out``, with ``errors`` or a
    ``reason``.

    ``median``, ``p20`` and ``p80`` are seconds per layer, and ``layers`` says of how many in one call.
    """
    device, single = problem.deltas.device, problem.first()
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    load = machine.Load()
    for candidate in candidates:
        part = problem if candidate.batched else single
        found[candidate.name] = result = {
            "status": "failed",
            "layers": part.layers,
            "telling": candidate.telling,
        }
        reason = candidate.left_out(problem.shape) or (
            "no time was left for it" if time.monotonic() > budget.until else None
        )
        if reason:
            result |= {"status": "left out", "reason": reason}
            continue
        run = call(candidate, part)
        try:
            seconds, output = timed(run, device)
            if seconds < SLOW or candidate is candidates[0]:
                seconds, output = timed(run, device)  # without what only the first call does
            result |= check.verdict(errors(output, part), candidate.limit, candidate.name.startswith(OURS))
            del output
        except Exception as error:  # one peer's failure is a result, and must not take the others along
            _log.warning("%s: %s failed", problem.shape.name, candidate.name, exc_info=error)
            result |= {"reason": f"{type(error).__name__}: {error}"}
            continue
        if result["status"] == "wrong":
            _log.warning("%s: %s is WRONG: %s", problem.shape.name, candidate.name, result["reason"])
            continue
        steps[candidate.name], first[candidate.name] = run, seconds
    ours = candidates[0].name
    times = interleaved(steps, first, ours, budget.seconds, device, seed)
    for name, series in times.items():
        layers = found[name]["layers"]
        found[name] |= summary([taken / layers for taken in series.values()])
        if ours in times:
            found[name] |= _relative(series, times[ours], layers, found[ours]["layers"])
    return {
        "shape": asdict(problem.shape),
        "timed_layers": problem.layers,
        "peers": found,
        "cpus_used_by_others": load.others(),
    }


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and its result.  On a GPU between events around it, the second of which is waited
    for.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3, result
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def interleaved(
    steps: Mapping[str, Callable[[], Any]],
    first: Mapping[str, float],
    ours: str,
    seconds: float,
    device: torch.device,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Times of every step by round; a round calls each step once, in an order of its own, so that noise hits
    all alike.

    Each takes part in as many rounds as last `seconds` by its time in `first`, but in a few at least, and
    ours in all.  One that is `SLOW` takes part in none: it has the time from `first`, under −1.
    """
    rounds = {
        name: 0 if taken > SLOW else min(_MOST, max(_FEWEST, math.ceil(seconds / taken)))
        for name, taken in first.items()
    }
    if ours in steps:
        rounds[ours] = max(rounds.values())
    times: dict[str, dict[int, float]] = {name: {} if rounds[name] else {-1: first[name]} for name in steps}
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(max(rounds.values(), default=0)):
            order = [name for name in steps if number < rounds[name]]
            shuffle(order)
            for name in order:
                times[name][number], _ = timed(steps[name], device)
    finally:
        gc.enable()
    return times


def _relative(
    series: Mapping[int, float], ours: Mapping[int, float], layers: int, our_layers: int
) -> dict[str, Any]:
    """Times per layer relative to ours, round by round, or to our median where there were no rounds."""
    typical = statistics.median(ours.values())
    return relative(
        [taken / layers for taken in series.values()],
        [ours.get(number, typical) / our_layers for number in series],
    )
