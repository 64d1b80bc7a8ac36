"""README.md of a merger's folder: made of the manifest alone, and left to whoever has written into it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import naming, write_text
from mingle.io.hub import ModelName
from mingle.io.licenses import CARD
from mingle.io.model_card import accuracies, end, head, of, page
from mingle.text import visible

_TAGS = ("merge", "mingle")
_WITHOUT_BASE = "The base model is not in this folder; both need it as `base=`."

logger = logging.getLogger(__name__)

#: the last line, which tells whether the text above it is still ours
_SIGNED = re.compile(r"<!-- written by mingle: ([0-9a-f]{16}) -->")


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the card of a merger's folder, unless it is there or somebody has changed it."""
    text, path = card(manifest), folder / CARD
    with naming(path):
        there = path.read_bytes().decode(errors="replace") if path.exists() else None
    if there == text:
        return
    if there is not None and not _ours(there):
        logger.info("%s: left as it is, since it is not as mingle wrote it", path)
        return
    write_text(path, text)


def card(manifest: Mapping[str, Any]) -> str:
    """The card of the folder with this manifest: Markdown, after the metadata that the hub reads."""
    base, count = ModelName.noted(manifest["base"]), len(manifest["tasks"])
    models = "One fine-tuned model" if count == 1 else f"{count} fine-tuned models"
    by = (
        f"`{visible(manifest['method'])}` by mingle {visible(manifest.get('versions', {}).get('mingle', ''))}"
    )
    text = page(
        head(f"{count} {'task' if count == 1 else 'tasks'} in one model", "mingle", _TAGS, manifest, base),
        f"{models}{of(base)}, merged one after another with the method {by}.",
        accuracies(manifest) if count else "",
        "## Use",
        "```python\nimport mingle\n\n"
        'model = mingle.load("path/to/this/folder")  # or its name on the hub\n'
        'merger = mingle.Merger.from_pretrained("path/to/this/folder")  # to add tasks, and to remove some\n'
        "```",
        "" if manifest["base"]["folder"] else _WITHOUT_BASE,
        "## Files",
        "| part | what |\n|---|---|\n"
        "| `manifest.json` | method, options, tasks in order, accuracies, hashes of all files |\n"
        "| `base-…/` | the base model |\n"
        "| `tasks/`, `state-…` | what the method keeps of each task, and of all together |\n"
        "| `generations/` | manifests of earlier states, to which `mingle rollback` returns |",
        end({**manifest, "options": dict(sorted(manifest["options"].items()))}, base),  # as they are read
    )
    return f"{text}\n<!-- written by mingle: {_digest(text)} -->\n"


def _ours(text: str) -> bool:
    above, _, last = text.removesuffix("\n").rpartition("\n")
    signed = _SIGNED.fullmatch(last)
    return signed is not None and signed[1] == _digest(above)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
