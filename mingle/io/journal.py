"""What is finished of one step of a merge that goes tensor by tensor, so that a killed one goes on there.

The tensors are planned to lie in parts.  Finished parts are files beside the manifest's, each written whole
and named by its content.  The journal lists them.  It is written anew after every part, and removed when the
manifest names the parts.  Of several processes each has a journal of its own, and the next run begins with
all of them, however many processes it has.

    .journal.json                    what step it is of, and for every pass its parts and what was found
    .journal-<rank>.json             the same of the other processes
    state-<hash>.safetensors         parts of the new state, already in the place where they will stay
    .aside-<hash>.safetensors        parts of what a pass set aside for a later one
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mingle import ranks
from mingle.io.files import (
    CheckpointError,
    contained,
    naming,
    read_json,
    rename,
    temporary_beside,
    write_json,
)
from mingle.io.lazy_tensors import LazyTensors, Rows
from mingle.io.manifest import DIGEST, TENSORS_NAME, check_files, entries_of, entry_of
from mingle.io.safetensors import CheckpointReader, write_tensors
from mingle.io.schema import check

logger = logging.getLogger(__name__)

Numbers = dict[str, float]
#: what a journal notes of every pass
Passes = list[dict[str, Any]]
JOURNAL, JOURNALS = ".journal.json", ".journal*.json"
#: what a last pass finds whose parts are set aside: how many tasks there were before the step
TASKS_BEFORE = "tasks before"
_JOURNAL_NAME = re.compile(r"\.journal(-\d+)?\.json")
ASIDE_NAME = re.compile(r"\.aside-[0-9a-f]{12}\.safetensors")
_FORMAT, _FORMAT_VERSION = "mingle-journal", 3
#: a part of which only numbers are noted has no file
_PART = {"file": (str, None), "bytes": int, "sha256": (DIGEST, None), "part": int, "numbers": [[float]]}
_FORM = {
    "format": str,
    "format_version": int,
    "step": DIGEST,
    "passes": [{"parts": [_PART], "found": ({str: float}, None)}],
    "sha256": DIGEST,
}


class Journal:
    """The journal of a folder, of which the processes of one group are the writers.

    All of them make it, and give the same step.

    Args:
        folder: the merger's folder.
        step: a SHA-256 of everything that the step's result depends on.  What another step has left counts
            for nothing, and neither does a part that is missing or changed.
    """

    def __init__(self, folder: Path, step: str) -> None:
        self.folder, self._step = folder, step
        first = ranks.rank() == 0
        self._path = folder / (JOURNAL if first else f".journal-{ranks.rank()}.json")
        # one process reads, as others may see what is on a shared disk a moment later
        self.passes = self._intact(ranks.gather(read(folder, step) if first else [])[0])
        self._own: Passes = self.passes if first else []
        with ranks.together(f"{folder}: taking over what is finished"):
            if first:
                self._take_over()

    def parts(self, number: int) -> list[dict[str, Any]]:
        """The parts that the pass of this number has finished, as a manifest has them."""
        return entries(_pass(self.passes, number))

    def finished(self, number: int) -> set[int]:
        """The places of these parts in the plan."""
        return {part["part"] for part in _pass(self.passes, number)["parts"]}

    def numbers(self, number: int) -> list[tuple[float, ...]]:
        """What that pass noted of each of their tensors."""
        return [tuple(row) for part in _pass(self.passes, number)["parts"] for row in part["numbers"]]

    def found(self, number: int) -> Numbers | None:
        """What the whole pass found; None while it is not over."""
        found: Numbers | None = _pass(self.passes, number)["found"]
        return found

    def write(
        self,
        number: int,
        part: int,
        tensors: Mapping[str, torch.Tensor],
        numbers: Sequence[Sequence[float]] = (),
        *,
        aside: bool = False,
    ) -> None:
        """Write a part of a pass, and then note it.

        Args:
            number: of the pass.
            part: its place in the plan.
            tensors: the part's.
            numbers: what is noted of each tensor of the tower in it.
            aside: for a later pass, and not part of the new state.
        """
        entry: dict[str, Any] = {"file": None, "bytes": 0, "sha256": None}
        if tensors:
            name, digest = self._write(".aside" if aside else "state", tensors)
            entry = entry_of(self.folder / name, name, digest)
        noted = entry | {"part": part, "numbers": [list(row) for row in numbers]}
        _pass(self._own, number)["parts"].append(noted)
        self._save()

    def _write(self, stem: str, tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
        """Write tensors to a file whose name has its SHA-256, known once it is written; its name and hash."""
        temporary = temporary_beside(self.folder / stem)
        try:
            digest = write_tensors(temporary, tensors)
            path = self.folder / f"{stem}-{digest[:12]}.safetensors"
            with naming(path):
                rename(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return path.name, digest

    def share(self, number: int) -> None:
        """Learn which parts of a pass the other processes have finished; all come here when they are done."""
        known = _pass(self.passes, number)
        own = ranks.gather(_pass(self._own, number)["parts"])
        known["parts"] = _in_order([known["parts"], *own])

    def conclude(self, number: int, found: Numbers) -> None:
        """Note what a whole pass found, the same in all processes."""
        _pass(self.passes, number)["found"] = found
        if ranks.rank() == 0:
            self._save()

    def _take_over(self) -> None:
        """Put what all processes of an earlier run have noted into this one's journal."""
        with naming(self.folder):
            others = [
                path for path in self.folder.glob(JOURNALS) if path != self._path and is_ours(path.name)
            ]
        if others and self.passes:
            self._save()
        for path in others:
            with naming(path):
                path.unlink()

    def _save(self) -> None:
        told = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "step": self._step,
            "passes": self._own,
        }
        write_json(self._path, told | {"sha256": identity(told)})

    def _intact(self, passes: Passes) -> Passes:
        """What is noted without the parts that are not as they were written; the processes share the work."""
        parts = [part for noted in passes for part in noted["parts"] if part["file"]]
        faults: dict[str, str] = {}
        for place in ranks.dealt([part["bytes"] for part in parts])[ranks.rank()]:
            try:
                check_files(self.folder, [parts[place]], JOURNAL)
            except CheckpointError as error:
                faults[parts[place]["file"]] = str(error)
        faults = {name: fault for each in ranks.gather(faults) for name, fault in each.items()}
        for fault in faults.values():
            logger.warning("%s; it is made again", fault)
        for noted in passes:
            noted["parts"] = [part for part in noted["parts"] if part["file"] not in faults]
        return passes


def read(folder: Path, step: str | None = None) -> Passes:
    """What the journals in a folder note; nothing where there is none, or only damaged ones.

    Args:
        folder: the folder.
        step: of which they have to be; None takes those of the step of the first.
    """
    with naming(folder):
        paths = sorted(path for path in folder.glob(JOURNALS) if is_ours(path.name) and _is_file(path))
    passes: Passes = []
    for found in filter(None, map(_noted, paths)):
        step = step or found["step"]
        if found["step"] == step:
            for number, noted in enumerate(found["passes"]):
                known = _pass(passes, number)
                known["parts"] = _in_order([known["parts"], noted["parts"]])
                known["found"] = known["found"] or noted["found"]
    return passes


def _noted(path: Path) -> dict[str, Any] | None:
    """What a journal says; None, after a warning, for a damaged one and for one of another version."""
    try:
        found: dict[str, Any] = read_json(path)
        if isinstance(found, dict) and found.get("format_version") != _FORMAT_VERSION:
            raise CheckpointError(f"{path}: another version of mingle has written it")
        check(found, _FORM, path)
        # A digit that changed would make other weights: of numbers and places, anything is plausible.
        if identity({key: value for key, value in found.items() if key != "sha256"}) != found["sha256"]:
            raise CheckpointError(f"{path}: was changed since it was written")
        for name in filter(None, (part["file"] for each in found["passes"] for part in each["parts"])):
            if "/" in name or not (TENSORS_NAME.fullmatch(name) or ASIDE_NAME.fullmatch(name)):
                raise CheckpointError(f"{path}: {name!r} is not the name of a part")
    except CheckpointError as error:
        logger.warning("%s; the step that it is of starts again", error)
        return None
    return found if found["format"] == _FORMAT else None


def _pass(passes: Passes, number: int) -> dict[str, Any]:
    """What is noted of the pass of this number, from now on if not before."""
    while len(passes) <= number:
        passes.append({"parts": [], "found": None})
    return passes[number]


def _in_order(lists: Sequence[Passes]) -> Passes:
    """The parts of several lists in the plan's order; of one that was made twice, the first."""
    parts: dict[int, dict[str, Any]] = {}
    for part in (part for each in lists for part in each):
        parts.setdefault(part["part"], part)
    return [parts[place] for place in sorted(parts)]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def files(folder: Path, passes: Passes) -> set[str]:
    """The names of the files that these passes need, which a folder's journals note, and of the journals."""
    named = {part["file"] for each in passes for part in each["parts"] if part["file"]}
    return named | ({path.name for path in folder.glob(JOURNALS)} if passes else set())


def is_over(passes: Passes, manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest already holds what a journal notes that is of some step."""
    if TASKS_BEFORE in (passes[-1]["found"] or {}):
        return len(manifest["tasks"]) > passes[-1]["found"][TASKS_BEFORE]
    return entries(passes[-1]) == entries_of(manifest["state"])


def entries(noted: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a pass as a manifest has them."""
    return [
        {key: part[key] for key in ("file", "bytes", "sha256")} for part in noted["parts"] if part["file"]
    ]


def is_ours(name: str) -> bool:
    """Whether a file of that name is a journal's alone."""
    return (_JOURNAL_NAME.fullmatch(name) or ASIDE_NAME.fullmatch(name)) is not None


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
        super().__init__(self._places)

    def described(self, name: str) -> torch.Tensor:
        return self._reader(name).described(name)

    def rows(self, name: str, rows: Rows) -> torch.Tensor:
        return self._reader(name).tensor(name, rows)

    def _reader(self, name: str) -> CheckpointReader:
        path = self._places[name]
        if self._open is None or self._open[0] != path:
            self._open = path, CheckpointReader(path)
        return self._open[1]


def identity(facts: Mapping[str, Any]) -> str:
    """A SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
