"""Numbers as the report writes them; a missing one is None or NaN."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

#: the methods that merge nothing, and bound all others from below and above
REFERENCES = ("pre-trained", "individual")


def is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 1) -> str:
    # + 0.0 turns −0.0 into 0.0
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") if is_known(value) else "–"


def mean_of(values: Sequence[float | None]) -> float:
    """NaN where any value is missing: a mean over the others would not be comparable."""
    known = [value for value in values if is_known(value)]
    return statistics.fmean(known) if known and len(known) == len(values) else math.nan


def mean_std(values: Sequence[float | None]) -> str:
    known = [value for value in values if is_known(value)]
    return number(mean_of(values)) + (
        f" ± {number(statistics.stdev(known))}" if len(known) == len(values) > 1 else ""
    )


def unknown_of(result: Mapping[str, Any]) -> list[float | None]:
    """The ACC of every order where the task has to be found; of earlier versions' files it is missing."""
    return result.get("acc_unknown") or [None] * len(result["acc"])


def has_unknown(results: Mapping[str, Any]) -> bool:
    """Whether any method of a run was measured where the task has to be found."""
    return any(is_known(value) for result in results["methods"].values() for value in unknown_of(result))


def caption(results: Mapping[str, Any]) -> str:
    count = max((len(result["acc"]) for result in results["methods"].values()), default=0)
    orders = f"{count} order{'' if count == 1 else 's'}"
    return f"suite {results['suite']}, protocol {results['protocol']}, {orders}"
