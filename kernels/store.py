"""What was measured on this machine for this user: a small JSON dictionary in the cache folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$MINGLE_CACHE`` or ``~/.cache/mingle``."""
    return Path(os.environ.get("MINGLE_CACHE") or Path.home() / ".cache" / "mingle")


class Store:
    """A dictionary of JSON values by string, read once and written at every `put`.

    A file that cannot be read counts as empty, one that cannot be written is kept in memory only; both are
    logged, neither is an error: everything in it can be measured again.
    """

    def __init__(self, name: str) -> None:
        self.path = cache_folder() / name
        self._values = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s: ignored: %s", self.path, error)
            return {}
        if not isinstance(values, dict):
            logger.warning("%s: ignored: expected a JSON object", self.path)
            return {}
        return values

    def get(self, key: str) -> Any:
        """The value stored under `key`, or None."""
        return self._values.get(key)

    def stored_meanwhile(self, key: str) -> Any:
        """The value that the file holds by now, perhaps another process's, or None."""
        return self._read().get(key)

    def put(self, key: str, value: Any) -> None:
        """Store `value`, and with it whatever another process has stored meanwhile."""
        self._values = {**self._read(), **self._values, key: value}
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(self._values, indent=1, sort_keys=True))
            scratch.replace(self.path)
        except OSError as error:
            logger.warning("%s: not written: %s", self.path, error)
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
