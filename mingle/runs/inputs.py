"""What a merge was made of, noted in the merged model's metadata: resuming with anything else is refused.

Of a model it is the hash of its files, so that neither copies nor clocks matter.  Of an image folder it is
the hash of its files' names and sizes: reading all images again would take longer than merging them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mingle.io.adapter_config import CONFIG as ADAPTER_CONFIG
from mingle.io.files import naming
from mingle.io.shared_folder import hashes

#: the key in the metadata: name of the task → its inputs
INPUTS = "inputs"


def note(metadata: dict[str, Any], name: str, model: Path) -> None:
    """Note a task's inputs.

    Args:
        metadata: of the merger; it has a `mingle.runs.origin`.
        name: the task's.
        model: the folder of its fine-tuned model or adapter.
    """
    noted = metadata.get(INPUTS)
    known = noted if isinstance(noted, dict) else {}
    metadata[INPUTS] = known | {name: _of(name, model, metadata["suite"])}


def changed(noted: Any, names: Sequence[str], models: Mapping[str, Path], suite: str | None) -> list[str]:
    """What is not as it was when these tasks were merged, in words; of what was not noted, nothing is known.

    Args:
        noted: what stands in the metadata.
        names: the merged tasks.
        models: their models now, as far as they are among those to be merged.
        suite: where samples come from now.
    """
    lines = []
    for name in names:
        before = noted.get(name) if isinstance(noted, dict) else None
        if not isinstance(before, dict) or name not in models:
            continue
        now = _of(name, models[name], suite)
        if before.get("model") != now["model"]:
            lines.append(f"expert {name!r}: the files in {models[name]} are not those that were merged")
        if before.get("samples") != now.get("samples"):
            lines.append(f"samples of {name!r}: the files in {suite} are not those that it was merged with")
    return lines


def _of(name: str, model: Path, suite: str | None) -> dict[str, str]:
    """The inputs of a task; samples are among them only where they are in a folder, as others are pinned."""
    digest = hashlib.sha256()
    with naming(model):
        files = sorted(path for path in model.iterdir() if path.is_file() and _is_read(path.name))
    for path, found in zip(files, hashes(files), strict=True):
        digest.update(f"{path.name}:{found};".encode(errors="backslashreplace"))
    samples = Path(suite or "") / name
    listed = {"samples": _listing(samples)} if suite and samples.is_dir() else {}
    return {"model": digest.hexdigest()} | listed


def _is_read(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name == ADAPTER_CONFIG


def _listing(folder: Path) -> str:
    """A hash of the names and sizes of all files below a folder."""
    digest = hashlib.sha256()
    with naming(folder):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                line = f"{path.relative_to(folder).as_posix()}:{path.stat().st_size};"
                digest.update(line.encode(errors="backslashreplace"))
    return digest.hexdigest()
