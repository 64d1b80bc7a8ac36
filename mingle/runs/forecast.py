"""What a merge that goes tensor by tensor will take of memory and disks, from headers alone."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mingle.io.base_files import base_files
from mingle.merging import streamed
from mingle.merging.finetuned import FineTuned
from mingle.methods.base import kept_size
from mingle.methods.tensorwise import TensorMethod

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Forecast:
    """What a merge will take from its beginning to its end, in bytes.

    Attributes:
        memory: of the process, at its peak.
        read, written: from and to files.
        disk: of the merger's folder, at its fullest.
    """

    memory: int
    read: int
    written: int
    disk: int

    def times(self, merges: int) -> Forecast:
        """That of several merges in turn, each into a folder of its own."""
        return Forecast(self.memory, merges * self.read, merges * self.written, merges * self.disk)


def of_merge(
    method: TensorMethod, base: Path, experts: Sequence[tuple[Path, FineTuned]], keep: int | None = None
) -> Forecast:
    """The forecast of a merge.

    Args:
        method: fitted to the base's skeleton.
        base: the base model's folder.
        experts: the folders of the models to be merged, and what is known of each, in their order.
        keep: how many generations are kept, each with a state of its own; None for all.
    """
    sizes = {name: kept_size([tensor]) for name, tensor in method.base.items()}
    costs = {name: method.cost_of(name) for name in sizes}
    state = sum(size + costs[name].kept for name, size in sizes.items())
    aside = sum(cost.aside for cost in costs.values())
    weights, copied = _size(base, (".safetensors",)), _size(base)
    known = experts[0][1]
    whole = kept_size(t for name, t in known.whole.items() if known.whole_first[name] == name)
    tower = round(weights * sum(sizes.values()) / whole)
    read, written, disk = weights + copied, copied, copied + state  # the base's hash, and its copy
    for seen, (folder, expert) in enumerate(experts):
        file = _size(folder, (".safetensors",))
        own = sum(expert.held[expert.own[name]].nbytes for name in sizes if name in expert.own)
        old, laid = (state, aside) if seen else (0, 0)
        # the hash of its files; and in every pass the base's, the merged and its own tensors
        read += file + (method.surveys(seen) + 1) * (tower + own + old) + laid
        written += state + laid
        held = state * (seen if keep is None else min(seen, keep))
        disk = max(disk, held + state + laid + (copied if seen else 0))
    work = max(3 * size + costs[name].memory for name, size in sizes.items())
    return Forecast(_resident() + min(state, streamed.PART_BYTES) + work, read, written, disk)


def available() -> int:
    """How many bytes of memory a process here can have at all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit
        return total


def _size(folder: Path, suffixes: tuple[str, ...] | None = None) -> int:
    files = base_files(folder) if suffixes is None else base_files(folder, suffixes)
    return sum(file.stat().st_size for file in files)


def _resident() -> int:
    """The most memory that this process has had so far: it has imported all that it needs."""
    try:  # on Linux getrusage would count what the process that started this one had, too
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
