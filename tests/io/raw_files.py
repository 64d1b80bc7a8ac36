"""Safetensors files and shard indexes with any content, and how a refusal is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file in the outer form of safetensors with any header, which may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_sharded(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.arange(3.0), "unlisted": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.arange(4)}, folder / "two.safetensors")
    write_index(folder, {"b": "two.safetensors", "a": "one.safetensors"})


def write_index(folder: Path, weight_map: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


def refusal(path: Path, *parts: str) -> str:
    """The message with which opening `path` is refused; it holds every one of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(path)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    return message
