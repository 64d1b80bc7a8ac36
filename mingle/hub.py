"""Where a model named in a config is: a local folder, or a pinned snapshot of a hub repository."""

from __future__ import annotations

from pathlib import Path

from mingle.files import CheckpointError


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`.

    A folder is taken as it is.  Anything else is a hub id: its safetensors, JSON and text files are fetched into the hub's own cache, or
    found there; code is never fetched.

    Raises:
        CheckpointError: neither a folder nor a hub model that can be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder}: a local folder has no revision {revision!r}")
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{model}: no such local folder, and not to be had from the hub ({reason})") from None
