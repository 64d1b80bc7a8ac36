"""Whether the processes of a group are about to make the same merge."""

from __future__ import annotations

import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mingle import ranks
from mingle.io.base_files import base_files
from mingle.io.provenance import versions
from mingle.options import OptionError
from mingle.runs.merge import MergePlan


def check_same(plan: MergePlan) -> None:
    """Raise `OptionError`, which names rank, host and what differs, unless all processes plan the same merge.

    Of models, names and sizes of files are compared: each process reads them by itself.
    """
    facts: dict[str, Any] = {f"the config's {key}": value for key, value in asdict(plan.config).items()}
    facts["the versions of mingle and PyTorch"] = versions()
    facts |= {f"expert {name!r}": _files(folder) for name, folder in plan.experts.items()}
    facts["the base"] = _files(plan.base)
    everyone = ranks.gather((socket.gethostname(), facts))
    first = everyone[0][1]
    for number, (host, found) in enumerate(everyone):
        if different := [key for key in first | found if found.get(key) != first.get(key)]:
            raise OptionError(
                f"rank {number} on host {host}: {different[0]} is not that of rank 0; start all processes "
                "with the same file, models and versions"
            )


def _files(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in base_files(folder)}
