"""Licences of models, as far as their cards name them, and whether several of them go together."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

CARD = "README.md"
_LARGEST = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
#: licences that allow a work to be passed on under any other, if only they are named
PERMISSIVE = frozenset(
    {"0bsd", "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0"}
    | {"cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "isc", "mit", "ms-pl", "ncsa", "pddl"}
    | {"unlicense", "wtfpl", "zlib"}
)


def license_of(folder: Path) -> str | None:
    """The licence that the card in a model's folder names; None where there is none, or none that is known.

    For ``other`` it is the name that goes with it, if there is one.
    """
    card = folder / CARD
    try:
        if not card.is_file() or card.stat().st_size > _LARGEST:
            return None
        from huggingface_hub import metadata_load

        found = metadata_load(card) or {}
        names = [found.get("license")]
        if names == ["other"]:
            names.insert(0, found.get("license_name"))
    except Exception as error:  # of strangers' YAML
        logger.debug("%s: no metadata: %s", card, error)
        return None
    return next((name.lower() for name in names if isinstance(name, str) and _NAME.fullmatch(name)), None)


def in_conflict(licenses: Iterable[str | None]) -> bool:
    """Whether licences differ that are known, and not all of these are permissive."""
    known = {name for name in licenses if name is not None}
    return len(known) > 1 and not known <= PERMISSIVE
