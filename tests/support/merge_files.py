"""YAML files of small merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def merge_file(folder: Path, base: Path, experts: Mapping[str, Path], method: str, **more: Any) -> Path:
    """``merge.yaml`` in a folder, with the keys in `more` beside base, method and experts."""
    listed = [{"name": name, "model": str(model)} for name, model in experts.items()]
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump({"base": str(base), "method": method, "experts": listed} | more))
    return path
