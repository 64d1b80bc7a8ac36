"""Which files of a model's folder belong to the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mingle.io.files import naming

#: of configurations, tokenizers, their chat templates, and processors
DATA_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
#: the folders inside that count → which of their files: the settings of what sentence-transformers does after
#: the transformer, such as ``1_Pooling``, and templates of chats beside the usual one
_INNER = {r"\d+_[A-Za-z]+": r"config\.json", "additional_chat_templates": r"[^/]+\.jinja"}
_INNER_FILE = re.compile("|".join(f"{folder}/{file}" for folder, file in _INNER.items()))
_INNER_FOLDER = re.compile("|".join(_INNER))
#: how the hub is asked for all of them
PATTERNS = ("*.safetensors", *(f"*{suffix}" for suffix in DATA_SUFFIXES))


def is_inner_folder(path: Path) -> bool:
    """Whether a folder inside a model's folder has files that belong to the model."""
    return _INNER_FOLDER.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()


def belongs(name: str, suffixes: Iterable[str] = (*DATA_SUFFIXES, ".safetensors")) -> bool:
    """Whether a file of this name, relative to a model's folder, belongs to the model.

    What is for other programs does not: code, pickles, and folders such as ``onnx`` and ``openvino``.
    """
    return ("/" not in name or _INNER_FILE.fullmatch(name) is not None) and name.endswith(tuple(suffixes))


def base_files(folder: Path, suffixes: tuple[str, ...] = (*DATA_SUFFIXES, ".safetensors")) -> list[Path]:
    """The files with these endings that belong to the model."""
    with naming(folder):
        inside = sorted(folder.iterdir())
        inner = [file for path in inside if is_inner_folder(path) for file in sorted(path.iterdir())]
        return [
            path
            for path in (*inside, *inner)
            if belongs(path.relative_to(folder).as_posix(), suffixes) and path.is_file()
        ]
