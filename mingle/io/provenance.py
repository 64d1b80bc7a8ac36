"""Where numbers come from: the device, the versions of everything they depend on, and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from mingle.version import __version__


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, as plain data."""
    return {
        "device": {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads()},
        "versions": versions() | {package: _version(package) for package in ("triton", "peft")},
        "commit": commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def versions() -> dict[str, str]:
    """The versions of mingle and of the packages that its numbers depend on."""
    import transformers

    return {
        "mingle": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with a ``+`` where tracked files differ; None outside a checkout of mingle.

    ``MINGLE_COMMIT`` names it where a checkout went to a machine without its history.
    """
    if given := os.environ.get("MINGLE_COMMIT"):
        return given
    here = Path(__file__).resolve()
    commands = (("ls-files", here.name), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    try:
        tracked, head, changes = (
            subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes) if tracked else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
