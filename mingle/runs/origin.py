"""Where a merger's samples and models came from, kept in its metadata for later additions and evaluations."""

from __future__ import annotations

from typing import Any

from mingle.io.hub import Revisions


def origin(
    suite: str | None = None,
    protocol: str = "strict",
    samples_per_class: int = 5,
    batch_size: int = 128,
    revisions: Revisions | None = None,
) -> dict[str, Any]:
    """The metadata of a merger.

    Args:
        suite: where samples come from; None where there are none.
        protocol, samples_per_class, revisions: see `mingle.suites.load`.
        batch_size: of evaluation.
    """
    return {
        "suite": suite,
        "protocol": protocol,
        "samples_per_class": samples_per_class,
        "batch_size": batch_size,
        "revisions": {} if revisions is None else revisions,
    }
