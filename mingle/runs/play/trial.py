"""What becomes of one input: answers, a router's decision, and gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Likely:
    """A class of a task, and its probability."""

    task: str
    label: str
    probability: float


@dataclass(frozen=True)
class Answer:
    """What one model answers: classes, the likeliest first, or a text; or the reason why there is nothing."""

    classes: tuple[Likely, ...] = ()
    text: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Routing:
    """Which task the input is of, in the router's eyes.

    Attributes:
        shares: task → how much speaks for it, a sum of 1; empty where there is no router.
        strange: whether the input is so strange to all of them that the base model answers.
        reason: why there are no shares.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    strange: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Gates:
    """How much of every task's expert was at work in every layer.

    Attributes:
        layers: their names.
        tasks: those that have experts.
        values: the gates [L, T], each the mean over the input's tokens; NaN in layers that were not called.
        reason: why there are none.
    """

    layers: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Trial:
    """All that is known of one input so far; what is still to come is None, or missing among the experts."""

    active: tuple[str, ...]
    merged: Answer
    routing: Routing
    gates: Gates
    base: Answer | None = None
    experts: Mapping[str, Answer] = field(default_factory=dict)
