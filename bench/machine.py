"""Where numbers come from: the device, versions, the commit, and whether other processes were using the CPUs
meanwhile.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from mingle.io import merger_folder

#: CPUs used by others from which timings are called disturbed
MUCH = 0.2


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, as plain data."""
    return {
        "device": {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads()},
        "versions": merger_folder.versions() | {package: _version(package) for package in ("triton", "peft")},
        "commit": _commit(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
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


class Load:
    """How many CPUs other processes keep busy from its making on: they slow threads that wait for one another
    out of all proportion.
    """

    def __init__(self) -> None:
        self._began, self._start = time.monotonic(), self._others()

    def others(self) -> float | None:
        """Busy CPUs on average, ours not counted; None where the system does not tell."""
        now = self._others()
        if now is None or self._start is None:
            return None
        return max(0.0, (now - self._start) / max(time.monotonic() - self._began, 1e-9))

    @staticmethod
    def _others() -> float | None:
        """CPU seconds that everyone else has used, and those that a hypervisor has taken."""
        try:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(
                int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            )
        except (OSError, ValueError):
            return None
        own = os.times()
        total = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return total - (own.user + own.system + own.children_user + own.children_system)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a ``+`` where tracked files differ from it; None outside a checkout of this
    project.
    """
    here = Path(__file__).resolve()
    try:
        tracked, commit, changes = (
            subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (("ls-files", here.name), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + "+" * bool(changes) if tracked else None
