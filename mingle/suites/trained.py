"""Fine-tuned models that a suite trains on first use, kept in the user's cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def trained(folder: Path, train: Callable[[Path], None]) -> Path:
    """The folder `folder`; where it does not exist yet, `train` fills it.

    Args:
        folder: in the cache.
        train: writes the model to the empty folder that it is given.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Trained beside its place and moved there whole: an interrupted training leaves no half expert.
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            train(scratch)
            scratch.chmod(0o755)
            try:
                scratch.replace(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
