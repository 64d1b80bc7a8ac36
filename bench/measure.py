"""How everything is timed: correctness first, then all that is right in turns, round by round."""

from __future__ import annotations

import gc
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mingle.bench.machine import LoadMeter, peak_bytes

log = logging.getLogger("mingle.bench")
#: what is known of one contestant, as `mingle.bench.record` says
Row = dict[str, Any]
Run = Callable[[], Any]
#: ratios are relative to this row; rows whose names begin with it are other forms of this library
OURS = "mingle"
#: seconds; where rounds are counted by `each`, what takes longer has the time of the call that was checked
SLOW = 4.0
_FEWEST_EACH, _MOST_EACH = 3, 40
_FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU


class Unavailable(Exception):
    """Something cannot run here, or has nothing to do with the case; the message is the reason."""


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise Unavailable(reason)


@dataclass(frozen=True)
class Contestant:
    """Something to be timed: `prepare` returns what is called, or None, and what a check found; `facts` go
    into its row, and peak `memory` where wanted.  Its seconds are those of one of `parts` parts.
    """

    name: str
    prepare: Callable[[], tuple[Run | None, Row]]
    facts: Row = field(default_factory=dict)
    parts: int = 1
    memory: bool = False


@dataclass(frozen=True)
class Rounds:
    """How often: after the `fewest` rounds, none is begun that would not end within `seconds`; or, everything
    takes part in as many of the first rounds as last `each` seconds.

    `flush`: on a GPU evict the L2 cache before each call, which gives the host time to enqueue the launches.
    `collect`: let Python collect garbage meanwhile, for calls that make cycles of large tensors.
    """

    seconds: float = 0.0
    fewest: int = 5
    most: int = 100
    each: float | None = None
    warm_ups: int = 1
    flush: bool = False
    collect: bool = False


def compare(
    contestants: Sequence[Contestant], device: torch.device, rounds: Rounds, seed: int = 0, ours: str = OURS
) -> tuple[list[Row], float | None]:
    """A row for each, correctness first, then times of what is right; and the CPUs others used meanwhile."""
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for one in contestants:
        rows[one.name] = row = {"name": one.name, "status": "failed", **one.facts}
        try:
            run, found = one.prepare()
            row |= found
            if run is not None and row["status"] in ("ok", "bound"):
                runs[one.name] = run
                row |= {"peak_bytes": peak_bytes(run, device)} if one.memory else {}
        except Unavailable as reason:
            row |= {"status": "unavailable", "reason": str(reason)}
        except Exception as error:  # one's failure is a result, and must not take the others along
            log.warning("%s failed", one.name, exc_info=error)
            row["reason"] = f"{type(error).__name__}: {error}"
        if row["status"] == "wrong":
            log.warning("%s is WRONG: %s", one.name, row["reason"])
    first = {name: row.pop("first_seconds") for name, row in rows.items() if "first_seconds" in row}
    shares, load = None if rounds.each is None else _shares(first, ours, rounds.each), LoadMeter()
    times, others = interleaved(runs, device, rounds, seed, shares), load.others()
    parts = {one.name: one.parts for one in contestants}
    taken = {name: [s / parts[name] for s in series or [first[name]]] for name, series in times.items()}
    for name, series in taken.items():
        rows[name] |= summary(series)
        if own := taken.get(ours):  # what was in no round is held against what is typical of ours
            rows[name] |= relative(series, own if times[name] else [statistics.median(own)])
    return list(rows.values()), others


def _shares(first: Mapping[str, float], ours: str, seconds: float) -> dict[str, int]:
    """In how many rounds each takes part: a few at least, and ours in all; what is `SLOW` in none."""
    wanted = {name: max(_FEWEST_EACH, math.ceil(seconds / taken)) for name, taken in first.items()}
    found = {name: 0 if first[name] > SLOW else min(_MOST_EACH, count) for name, count in wanted.items()}
    return found | ({ours: max(found.values())} if ours in found else {})


def interleaved(
    steps: Mapping[str, Run], device: torch.device, rounds: Rounds, seed: int = 0,
    shares: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every step in every round; a round calls each step once, in an order of its own, so that
    noise hits all alike.  With `shares`, every step takes part in that many of the first rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, most = list(steps), rounds.most if shares is None else max(shares.values(), default=0)
    evicts, shuffle = rounds.flush and device.type == "cuda", random.Random(seed).shuffle
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if evicts else None
    gc.collect()
    if not rounds.collect:
        gc.disable()
    try:
        for run in (run for run in steps.values() for _ in range(rounds.warm_ups)):
            run()
        began = time.perf_counter()
        for done in range(most if steps else 0):
            passed = time.perf_counter() - began
            if shares is None and done >= rounds.fewest and passed * (done + 1) / done > rounds.seconds:
                break
            shuffle(order)
            marks = []
            for name in (name for name in order if shares is None or done < shares[name]):
                if flush is None:
                    times[name].append(timed(steps[name], device)[0])
                else:
                    flush.zero_()
                    marks.append((name, _event(), steps[name](), _event()))
            if marks:  # the GPU is waited for after the last step only
                torch.cuda.synchronize(device)
            for name, start, _, end in marks:
                times[name].append(start.elapsed_time(end) / 1e3)
    finally:
        gc.enable()
    return times


def timed(run: Run, device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, and its result; on a GPU between events around it."""
    if device.type != "cuda":
        began, result = time.perf_counter(), run()
        return time.perf_counter() - began, result
    torch.cuda.synchronize(device)
    start, result, end = _event(), run(), _event()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, result


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def verdict(errors: Mapping[str, float], tolerance: float, others: Mapping[str, float] | None = None) -> Row:
    """Status, errors and tolerance: each error is at most `tolerance` on both sides of zero.

    With `others`, that is the limit of the first, these are limits of more, and the rest are only shown.
    """
    limits = dict.fromkeys(errors if others is None else list(errors)[:1], tolerance) | dict(others or {})
    wrong = [name for name, limit in limits.items() if not -limit <= errors[name] <= limit]
    shown = {name: error if math.isfinite(error) else None for name, error in errors.items()}  # as JSON wants
    reasons = [f"{name} is off by {errors[name]:.1e}, allowed {limits[name]:.1e}" for name in wrong]
    row: Row = {"status": "wrong" if wrong else "ok", "errors": shown, "tolerance": tolerance}
    return row | ({"reason": "; ".join(reasons)} if wrong else {})


def summary(series: Sequence[float]) -> Row:
    """Median, 20th and 80th percentile, count and all of the times in seconds."""
    return _percentiles("", series) | {"repetitions": len(series), "seconds": list(series)}


def relative(series: Sequence[float], ours: Sequence[float]) -> Row:
    """How many times as long as ours: by the medians, and per round, which drift of the machine does not
    touch; the i-th times are those of one round.
    """
    rounds = _percentiles("round_ratio_", [theirs / own for theirs, own in zip(series, ours, strict=False)])
    ratio = {"ratio": statistics.median(series) / statistics.median(ours)}
    return ratio | {"round_ratio": rounds.pop("round_ratio_median"), **rounds}


def _percentiles(prefix: str, series: Sequence[float]) -> Row:
    cuts = statistics.quantiles(series, n=5, method="inclusive") if len(series) > 1 else [series[0]] * 4
    return {f"{prefix}median": statistics.median(series), f"{prefix}p20": cuts[0], f"{prefix}p80": cuts[3]}
