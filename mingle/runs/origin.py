"""Where a merger's samples and models came from, kept in its metadata for later additions and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingle.io import schema
from mingle.io.files import CheckpointError
from mingle.io.hub import Revisions
from mingle.io.manifest import MANIFEST

_FORM = {
    "suite": (str, None),
    "protocol": str,
    "samples_per_class": int,
    "batch_size": int,
    "revisions": {str: str},
}


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


def check_origin(metadata: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` where what there is of an origin in a saved merger's metadata is not one."""
    form = {key: form for key, form in _FORM.items() if key in metadata}
    schema.check({"metadata": metadata}, {"metadata": form}, folder / MANIFEST)
    for key, least in (("samples_per_class", 0), ("batch_size", 1)):
        if metadata.get(key, least) < least:
            raise CheckpointError(f"{folder / MANIFEST}: metadata.{key}: expected {least} or more")
