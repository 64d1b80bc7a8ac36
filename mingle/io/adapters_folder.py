"""A merge as LoRA adapters of the untouched base, in PEFT's layout, and what decides between them.

    router.json             what the folder holds: method, options, tasks in order, which folder is whose
    router.safetensors      all that is kept of the merge beside experts: gates or statistics, protected bases
    README.md
    <task>/adapter_config.json
    <task>/adapter_model.safetensors

In `router.safetensors` the tensors of task i, from 0 on, are called ``tasks/<i>/<name>``, and those of all
tasks together ``state/<name>``; the names of layers count from the part of the model that is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mingle.io.adapter_config import CONFIG, WEIGHTS
from mingle.io.files import CheckpointError, contained, naming, write_json, write_text
from mingle.io.manifest import BASE, DIGEST, MERGE, TASK, check_files, entry_of, read_merge
from mingle.io.provenance import versions
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.staging import staged
from mingle.options import shown

DESCRIPTION, ROUTER = "router.json", "router.safetensors"
_FORMAT, _FORMAT_VERSION = "mingle-adapters", 1
_SIZES = {"bytes": int, "sha256": DIGEST}
_FORM = MERGE | {
    "tasks": [
        TASK | {"adapter": (_SIZES | {"file": re.compile(f"[A-Za-z0-9_-]+/{re.escape(WEIGHTS)}")}, None)}
    ],
    "base": BASE | {"sha256": DIGEST},
    "router": _SIZES | {"file": re.compile(re.escape(ROUTER))},
}
_SHOWN = 5
Tensors = dict[str, torch.Tensor]


class AdapterFiles(NamedTuple):
    """The content of an adapter's folder: its configuration, and its factors under PEFT's names."""

    config: Mapping[str, Any]
    tensors: Tensors


def folder_names(tasks: Iterable[str]) -> list[str]:
    """A folder's name for each task, which is also one that PEFT takes for an adapter.

    They are letters, digits, hyphens and underscores of ASCII, and differ in more than the case of letters.
    """
    names: list[str] = []
    taken: set[str] = set()
    for task in tasks:
        stem = name = re.sub(r"[^A-Za-z0-9_-]+", "_", task)[:48].strip("_-") or "task"
        number = 2
        # PEFT keeps adapters in a ModuleDict, which has no place for the names of its own attributes
        while name.lower() in taken or hasattr(torch.nn.ModuleDict, name):
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
        taken.add(name.lower())
    return names


def write(
    folder: Path,
    description: Mapping[str, Any],
    adapters: Mapping[str, AdapterFiles],
    tasks: Sequence[Tensors],
    state: Tensors,
    card: str,
) -> None:
    """Write a folder of adapters, whole or not at all, see `mingle.io.staging.staged`.

    Args:
        folder: a new or an empty folder.
        description: what `router.json` says, except for sizes and hashes of files; a task's ``adapter`` is
            the name of its folder, or None.
        adapters: folder → what is in it.
        tasks: what else is kept of each task.
        state: what is kept of all tasks together.
        card: the text of the README.

    Raises:
        CheckpointError: the folder is in use, another process is writing it, or the disk is full.
    """
    router = {f"tasks/{i}/{key}": t for i, tensors in enumerate(tasks) for key, t in tensors.items()}
    router |= {f"state/{key}": tensor for key, tensor in state.items()}
    parts = [router, *(adapter.tensors for adapter in adapters.values())]
    with staged(folder, sum(tensor.nbytes for part in parts for tensor in part.values())) as staging:
        entries: dict[str | None, Any] = {None: None}
        for name, adapter in adapters.items():
            with naming(staging / name):
                (staging / name).mkdir()
            write_json(staging / name / CONFIG, adapter.config)
            entries[name] = _write(staging, f"{name}/{WEIGHTS}", adapter.tensors)
        said = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            **description,
            "tasks": [task | {"adapter": entries[task["adapter"]]} for task in description["tasks"]],
            "router": _write(staging, ROUTER, router),
            "versions": versions(),
        }
        write_text(staging / "README.md", card)
        write_json(staging / DESCRIPTION, said)


def _write(folder: Path, name: str, tensors: Tensors) -> dict[str, Any]:
    return entry_of(folder / name, name, write_tensors(folder / name, tensors))


@dataclass(frozen=True)
class Adapters:
    """A folder of adapters whose description and files were checked."""

    folder: Path
    description: dict[str, Any]

    @property
    def path(self) -> Path:
        """Of the description."""
        return self.folder / DESCRIPTION

    def names(self) -> list[str | None]:
        """Each task's folder, in order; None for those without an adapter."""
        entries = [task["adapter"] for task in self.description["tasks"]]
        return [None if entry is None else entry["file"].partition("/")[0] for entry in entries]

    def router(self) -> tuple[list[Tensors], Tensors]:
        """What is kept of each task beside its expert, and what is kept of all tasks together."""
        tasks: list[Tensors] = [{} for _ in self.description["tasks"]]
        places = {f"tasks/{i}": tensors for i, tensors in enumerate(tasks)}
        state: Tensors = {}
        for name, tensor in CheckpointReader(contained(self.folder, ROUTER)).state_dict().items():
            found = re.fullmatch(r"(state|tasks/\d+)/(.+)", name, re.DOTALL)
            place = None if found is None else state if found[1] == "state" else places.get(found[1])
            if found is None or place is None:
                raise CheckpointError(f"{self.folder / ROUTER}: tensor {shown(name)} belongs to nothing")
            place[found[2]] = tensor
        return tasks, state

    def check_base(self, found: str) -> None:
        """Refuse any base but the one that the adapters are for."""
        wanted = self.description["base"]["sha256"]
        if found != wanted:
            name = self.description["base"]["name"]
            called = "" if name is None else f", called {name!r} there"
            raise CheckpointError(
                f"{self.folder}: made for another base model{called} (SHA-256 {wanted[:12]}…, the given one "
                f"has {found[:12]}…)"
            )


def load(folder: Path) -> Adapters:
    """The description of a folder of adapters, once every file of tensors that it names is checked.

    Presence, size and hash are compared before any tensor is read.

    Raises:
        CheckpointError: adapters that no merge was exported as, with how to merge them; another format or
            version, or a missing, truncated or changed file, which the message names.
    """
    path = contained(folder, DESCRIPTION)
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {_instead(folder)}")
    description = read_merge(path, _FORMAT, _FORMAT_VERSION, _FORM)
    entries = [task["adapter"] for task in description["tasks"] if task["adapter"] is not None]
    if len({entry["file"] for entry in entries}) < len(entries):
        raise CheckpointError(f"{path}: tasks: two of them have the same adapter")
    check_files(folder, [*entries, description["router"]], DESCRIPTION)
    return Adapters(folder, description)


def _instead(folder: Path) -> str:
    """The way to merge whatever adapters the folder holds."""
    with naming(folder):
        inside = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
    if (folder / CONFIG).is_file():
        found = "the folder is a LoRA adapter by itself"
    elif inside:
        more = f" and {len(inside) - _SHOWN} more" if len(inside) > _SHOWN else ""
        found = f"the folder holds the LoRA adapters {', '.join(map(repr, inside[:_SHOWN]))}{more}"
    else:
        return f"{folder} does not hold adapters that a merge was exported as"
    how = "merger = mingle.Merger(base, 'routed') and merger.add(name, folder, samples) for each adapter"
    return f"{found}, which no merge was exported as; merge with {how}"
