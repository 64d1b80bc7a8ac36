"""A folder that all processes of a group work in: whether they see the same one, and reading it together."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle import ranks
from mingle.io.files import CheckpointError, naming, sha256, writable
from mingle.io.manifest import check_files

#: seconds until a file that one machine wrote is seen by others, at most
_DELAY = 10.0


def check_shared(folder: Path) -> None:
    """Raise `CheckpointError` unless all processes of the group see the same folder, and can write to it.

    Rank 0 writes a file that the others look for, for as long as a network's file system may keep what it
    knew before.  All of them come here, and rank 0 is the folder's writer.
    """
    if ranks.size() == 1:
        return
    name = f".mingle-tmp-{os.getpid()}-{secrets.token_hex(8)}-seen"
    token = folder / ranks.gather(name)[0]
    try:
        if ranks.rank() == 0:
            with naming(token):
                token.touch()
        ranks.gather(None)
        end = time.monotonic() + _DELAY
        while ranks.rank() and not token.exists():
            if time.monotonic() > end:
                who = f"rank {ranks.rank()} on host {socket.gethostname()}"
                advice = "name a folder on a disk that all of them share, by the same path"
                raise CheckpointError(f"{folder}: {who} does not see what rank 0 writes there; {advice}")
            time.sleep(0.1)
        if ranks.rank():
            writable(folder)
        ranks.gather(None)
    finally:
        if ranks.rank() == 0:
            with naming(token):
                token.unlink(missing_ok=True)


def check_files_together(folder: Path, entries: Sequence[Mapping[str, Any]], source: str) -> None:
    """`mingle.io.manifest.check_files`, each file by one process of the group; all of them come here."""
    with ranks.together("checking files"):
        share = ranks.dealt([entry["bytes"] for entry in entries])[ranks.rank()]
        check_files(folder, [entries[place] for place in share], source)


def hashes(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of every file, each found by one process of the group; all of them come here."""
    with ranks.together("reading files"):
        share = ranks.dealt([file.stat().st_size for file in files])[ranks.rank()]
        found = {place: sha256(files[place]) for place in share}
        for each in ranks.gather(found):
            found |= each
    return [found[place] for place in range(len(files))]
