"""Which files of a base model's folder belong to the model."""

from __future__ import annotations

import re
from pathlib import Path

from mingle.io.files import naming

#: of configurations, tokenizers and processors
DATA_SUFFIXES = (".json", ".txt", ".model")
_MODULE = re.compile(r"\d+_[A-Za-z]+")


def is_module(path: Path) -> bool:
    """Whether a path in a base's folder is one of sentence-transformers' own, such as ``1_Pooling``.

    Such a folder holds the settings of what comes after the transformer.
    """
    return _MODULE.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def base_files(folder: Path, suffixes: tuple[str, ...] = (*DATA_SUFFIXES, ".safetensors")) -> list[Path]:
    """The files with these endings that belong to the model, those of its modules included."""
    with naming(folder):
        inside = sorted(folder.iterdir())
        modules = [path / "config.json" for path in inside if is_module(path)]
        return [path for path in (*inside, *modules) if path.suffix in suffixes and path.is_file()]
