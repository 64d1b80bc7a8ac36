"""What is finished of one step of a merge that goes tensor by tensor, so that a killed one goes on there.

The finished tensors lie in part files beside the manifest's, each written whole and named by its content.
The journal lists them.  It is written anew after every part, and removed when the manifest names the parts.

    .journal.json                    what step it is of, and for every pass its parts and what was found
    state-<hash>.safetensors         parts of the new state, already in the place where they will stay
    .aside-<hash>.safetensors        parts of what a pass set aside for a later one
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mingle.io.files import CheckpointError, contained, read_json, write_json
from mingle.io.lazy_tensors import LazyTensors, Rows
from mingle.io.manifest import DIGEST, TENSORS_NAME, check_files, entries_of, entry_of
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.schema import check
from mingle.io.state_dicts import state_hash

logger = logging.getLogger(__name__)

Numbers = dict[str, float]
#: what a journal notes of every pass
Passes = list[dict[str, Any]]
JOURNAL = ".journal.json"
#: what a last pass finds whose parts are set aside: how many tasks there were before the step
TASKS_BEFORE = "tasks before"
ASIDE_NAME = re.compile(r"\.aside-[0-9a-f]{12}\.safetensors")
_FORMAT, _FORMAT_VERSION = "mingle-journal", 1
_PART = {"file": str, "bytes": int, "sha256": DIGEST, "tensors": int, "numbers": [[float]]}
_FORM = {
    "format": str,
    "format_version": int,
    "step": DIGEST,
    "passes": [{"parts": [_PART], "found": ({str: float}, None)}],
}


class Journal:
    """The journal of a folder, of which this process is the writer.

    Args:
        folder: the merger's folder.
        step: a SHA-256 of everything that the step's result depends on.  What another step has left counts
            for nothing, and neither does a part that is missing or changed, or what came after it.
    """

    def __init__(self, folder: Path, step: str) -> None:
        self.folder, self._path, self._step = folder, folder / JOURNAL, step
        self.passes = self._intact(read(folder, step))

    def parts(self, number: int) -> list[dict[str, Any]]:
        """The parts that the pass of this number has finished, as a manifest has them."""
        return entries(self._pass(number))

    def tensors(self, number: int) -> int:
        """How many tensors that pass has finished."""
        parts = self._pass(number)["parts"]
        return int(parts[-1]["tensors"]) if parts else 0

    def numbers(self, number: int) -> list[tuple[float, ...]]:
        """What that pass noted of each of them."""
        return [tuple(row) for part in self._pass(number)["parts"] for row in part["numbers"]]

    def found(self, number: int) -> Numbers | None:
        """What the whole pass found; None while it is not over."""
        found: Numbers | None = self._pass(number)["found"]
        return found

    def write(
        self,
        number: int,
        tensors: Mapping[str, torch.Tensor],
        finished: int,
        numbers: Sequence[Sequence[float]] = (),
        *,
        aside: bool = False,
    ) -> None:
        """Write a part of a pass, and then note it.

        Args:
            number: of the pass.
            tensors: the part's.
            finished: how many tensors of the tower the pass has finished with it.
            numbers: what is noted of those that are new among them.
            aside: for a later pass, and not part of the new state.
        """
        name = f"{'.aside' if aside else 'state'}-{state_hash(tensors)[:12]}.safetensors"
        entry = entry_of(self.folder / name, name, write_tensors(self.folder / name, tensors))
        self._pass(number)["parts"].append(
            entry | {"tensors": finished, "numbers": [list(row) for row in numbers]}
        )
        self._save()

    def conclude(self, number: int, found: Numbers) -> None:
        """Note what a whole pass found."""
        self._pass(number)["found"] = found
        self._save()

    def _pass(self, number: int) -> dict[str, Any]:
        while len(self.passes) <= number:
            self.passes.append({"parts": [], "found": None})
        return self.passes[number]

    def _save(self) -> None:
        write_json(
            self._path,
            {
                "format": _FORMAT,
                "format_version": _FORMAT_VERSION,
                "step": self._step,
                "passes": self.passes,
            },
        )

    def _intact(self, passes: Passes) -> Passes:
        """The beginning of what is noted whose parts are as they were written."""
        kept: Passes = []
        for noted in passes:
            parts: Passes = []
            kept.append({"parts": parts, "found": None})
            for part in noted["parts"]:
                try:
                    check_files(self.folder, [part], JOURNAL)
                except CheckpointError as error:
                    logger.warning("%s; it is made again", error)
                    return kept
                parts.append(part)
            kept[-1]["found"] = noted["found"]
        return kept


def read(folder: Path, step: str | None = None) -> Passes:
    """What the journal in a folder notes; nothing where there is none, or only a damaged one.

    Args:
        folder: the folder.
        step: of which it has to be; None takes that of any step.
    """
    path = folder / JOURNAL
    if not path.is_file() or path.is_symlink():
        return []
    try:
        found = read_json(path)
        check(found, _FORM, path)
        for name in (part["file"] for each in found["passes"] for part in each["parts"]):
            if "/" in name or not (TENSORS_NAME.fullmatch(name) or ASIDE_NAME.fullmatch(name)):
                raise CheckpointError(f"{path}: {name!r} is not the name of a part")
    except CheckpointError as error:
        logger.warning("%s; the step that it is of starts again", error)
        return []
    known = found["format"] == _FORMAT and found["format_version"] == _FORMAT_VERSION
    passes: Passes = found["passes"]
    return passes if known and step in (None, found["step"]) else []


def files(passes: Passes) -> set[str]:
    """The names of the files that a journal needs which notes these passes, its own among them."""
    named = {part["file"] for each in passes for part in each["parts"]}
    return named | ({JOURNAL} if passes else set())


def is_over(passes: Passes, manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest already holds what a journal notes that is of some step."""
    if TASKS_BEFORE in (passes[-1]["found"] or {}):
        return len(manifest["tasks"]) > passes[-1]["found"][TASKS_BEFORE]
    return entries(passes[-1]) == entries_of(manifest["state"])


def entries(noted: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a pass as a manifest has them."""
    return [{key: part[key] for key in ("file", "bytes", "sha256")} for part in noted["parts"]]


def is_ours(name: str) -> bool:
    """Whether a file of that name is a journal's alone."""
    return name == JOURNAL or ASIDE_NAME.fullmatch(name) is not None


class PartFiles(LazyTensors):
    """The tensors of several files by name, each read when it is asked for; one file is open at a time.

    Args:
        folder: the folder of the files.
        entries: what a manifest or a journal says of each.

    Raises:
        CheckpointError: a broken file, or a tensor that is in two of them.
    """

    def __init__(self, folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        self._places: dict[str, Path] = {}
        self._open: tuple[Path, CheckpointReader] | None = None
        for path in (contained(folder, entry["file"]) for entry in entries):
            for name in CheckpointReader(path):
                if self._places.setdefault(name, path) != path:
                    raise CheckpointError(f"{path}: {name!r} is also in {self._places[name].name}")

    def described(self, name: str) -> torch.Tensor:
        return self._reader(name).described(name)

    def rows(self, name: str, rows: Rows) -> torch.Tensor:
        return self._reader(name).tensor(name, rows)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def _reader(self, name: str) -> CheckpointReader:
        path = self._places[name]
        if self._open is None or self._open[0] != path:
            self._open = path, CheckpointReader(path)
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def identity(facts: Mapping[str, Any]) -> str:
    """A SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
