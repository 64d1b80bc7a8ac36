"""What a merge that goes tensor by tensor will take of memory and disks, from headers alone."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mingle.io.base_files import base_files
from mingle.io.lazy_tensors import row_blocks
from mingle.merging import streamed
from mingle.merging.finetuned import FineTuned
from mingle.merging.streamed_experts import bytes_of_expert
from mingle.methods import MergeMethod
from mingle.methods.base import kept_size
from mingle.methods.gated import GatedMethod
from mingle.methods.tensorwise import Cost, TensorMethod

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
    method: MergeMethod, base: Path, experts: Sequence[tuple[Path, FineTuned]], keep: int | None = None
) -> Forecast:
    """The forecast of a merge.

    Args:
        method: fitted to the base's skeleton; one that `mingle.merging.streamed.streams`.
        base: the base model's folder.
        experts: the folders of the models to be merged, and what is known of each, in their order.
        keep: how many generations are kept, each with a state of its own; None for all.
    """
    if isinstance(method, GatedMethod):
        return _of_experts(method, base, experts)
    assert isinstance(method, TensorMethod)
    sizes = {name: kept_size([tensor]) for name, tensor in method.base.items()}
    costs = {name: method.cost_of(name) for name in sizes}
    state = of_step(method, 0)
    aside = of_step(method, 1) - state
    weights, copied = _size(base, (".safetensors",)), _size(base)
    known = experts[0][1]
    tower = round(weights * sum(sizes.values()) / _whole(known))
    read, written, disk = weights + copied, copied, copied + state  # the base's hash, and its copy
    files = sum(_size(folder, (".safetensors",)) for folder, _ in experts)  # which are hashed
    owned = [
        sum(expert.held[expert.own[name]].nbytes for name in sizes if name in expert.own)
        for _, expert in experts
    ]
    work = max(_work(method, name, size, costs[name]) for name, size in sizes.items())
    memory = _resident() + min(state, streamed.PART_BYTES) + work
    if keep == 1 and method.in_one_pass(0, len(experts)):
        return Forecast(memory, read + files + tower + sum(owned), written + state, disk)
    read += files
    for seen, own in enumerate(owned):
        old, laid = (state, aside) if seen else (0, 0)
        # in every pass the base's, the merged and its own tensors
        read += (method.surveys(seen) + 1) * (tower + own + old) + laid
        written += state + laid
        held = state * (seen if keep is None else min(seen, keep))
        disk = max(disk, held + state + laid + (copied if seen else 0))
    return Forecast(memory, read, written, disk)


def of_step(method: MergeMethod, seen: int) -> int:
    """The bytes that one step writes before any of an earlier one can go, after so many others."""
    if isinstance(method, GatedMethod):
        return 2 * sum(bytes_of_expert(method, layer) for layer in method.layers.values())
    assert isinstance(method, TensorMethod)
    costs = [(kept_size([tensor]), method.cost_of(name)) for name, tensor in method.base.items()]
    return sum(size + cost.kept + (cost.aside if seen else 0) for size, cost in costs)


def _work(method: TensorMethod, name: str, size: int, cost: Cost) -> int:
    """The bytes that merging a tensor takes with what is read for it, a large one in blocks of rows."""
    blocks = len(row_blocks(method.base[name])) if method.elementwise(name) else 1
    together = 3 * size + cost.memory
    return together if blocks == 1 else size + cost.kept + together // blocks


def _of_experts(method: GatedMethod, base: Path, experts: Sequence[tuple[Path, FineTuned]]) -> Forecast:
    """The same of a method that makes experts."""
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in method.layers.items()}
    made = sum(bytes_of_expert(method, layer) for layer in method.layers.values())
    targets = {f"{name}.weight" for name in shapes}
    first = next(iter(method.merges()))
    weights, copied = _size(base, (".safetensors",)), _size(base)
    read, written, disk = weights + copied, copied, copied + 2 * made  # the base's hash, and its copy
    for seen, (folder, expert) in enumerate(experts):
        on_disk = weights / _whole(expert)  # of a byte in float32
        held = {name: expert.held[own].nbytes for name, own in expert.own.items()}
        base_targets = round(on_disk * kept_size(method.base[name] for name in targets))
        others = {
            name: size for name, size in held.items() if name not in targets and expert.first[name] == name
        }
        base_others = on_disk * kept_size(method.base[name] for name in others)
        # the first layer twice, to see that it differs; where others do not differ, all of them beside the
        # base's, and else only what comes before the difference; the new experts, when they are put together
        read += _size(folder, (".safetensors",)) + base_targets + sum(held.get(name, 0) for name in targets)
        read += round(on_disk * kept_size([method.base[first]])) + held.get(first, 0)
        read += round(1.5 * sum(others.values()) + 0.5 * base_others) + 2 * made
        read += seen * made if method.projects else 0
        written += 2 * made
        disk = max(disk, copied + (seen + 2) * made)
    work = max(_work_of_expert(method, *shape, len(experts) > 1) for shape in shapes.values())
    return Forecast(_resident() + min(made, streamed.PART_BYTES) + work, read, written, disk)


def _work_of_expert(method: GatedMethod, height: int, width: int, later: bool) -> int:
    """The bytes that making a layer's expert takes, as they were counted for shapes of all kinds.

    Both models' weights; Δ and what is left of it, both also in float64, and a copy; in the decomposition,
    Gram matrices of the shorter side and as many vectors as it iterates on.
    """
    vectors = (method.options.rank + 64) * (height + width)
    left = height * width if later and method.projects else 0
    return 4 * (8 * height * width + left + 6 * min(height, width) ** 2 + vectors)


def _whole(model: FineTuned) -> int:
    """The bytes of the whole base in float32."""
    return kept_size(t for name, t in model.whole.items() if model.whole_first[name] == name)


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
