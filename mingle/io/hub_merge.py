"""What mingle saved or exported, from the hub: fetched file by file, as its manifest names them."""

from __future__ import annotations

from pathlib import Path

from mingle.io import hub
from mingle.io.adapter_config import CONFIG, WEIGHTS
from mingle.io.adapters_folder import DESCRIPTION, ROUTER
from mingle.io.base_files import belongs
from mingle.io.manifest import MANIFEST, files_of, read_manifest


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a merge, of adapters or of a plain model.

    Of a merge on the hub the generation in use is fetched, and its base; of adapters all of them.

    Args:
        model: a folder or a hub id.
        revision: a commit, branch or tag of the hub id; None takes ``main``.

    Raises:
        CheckpointError: see `mingle.io.hub.resolve`; or a broken manifest.
    """
    if (folder := hub.local(model, revision)) is not None:
        return folder
    found = hub.snapshot(model, "model", revision)
    if MANIFEST in found.files:
        manifest = read_manifest(found.fetch([MANIFEST]))
        base = manifest["base"]["folder"]
        inside = [name for name in found.files if base is not None and name.startswith(f"{base}/")]
        wanted = [name for name in inside if belongs(name.removeprefix(f"{base}/"))]
        return found.fetch([MANIFEST, *(entry["file"] for entry in files_of(manifest)), *wanted])
    if DESCRIPTION in found.files:
        adapters = [name for name in found.files if name.endswith((f"/{CONFIG}", f"/{WEIGHTS}"))]
        return found.fetch([DESCRIPTION, ROUTER, *adapters])
    return hub.resolve(model, revision)
