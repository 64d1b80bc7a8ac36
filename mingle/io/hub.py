"""Where a model or a data set is: a local folder, or a pinned snapshot in the hub's own cache.

A repository is resolved to a commit when it is first used, and a merge keeps to that commit (`Revisions`).
Only files that hold data are fetched: of models those that `mingle.io.base_files.belongs` names, Parquet of
data sets; never code, never pickles.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from mingle.io.base_files import PATTERNS, belongs
from mingle.io.files import CheckpointError, naming, similar
from mingle.io.licenses import CARD, license_of
from mingle.options import shown

logger = logging.getLogger(__name__)

#: repository → the commit in use; a data set is named ``datasets/<id>``, as in the hub's addresses
Revisions = MutableMapping[str, str]

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)

Kind = Literal["model", "dataset"]


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def resolve(model: str, revision: str | None = None, revisions: Revisions | None = None) -> Path:
    """The local folder of `model`.

    A folder is taken as it is.  Anything else is a hub id, whose files are fetched into the hub's cache or
    found there.

    Args:
        model: a folder or a hub id.
        revision: a commit, branch or tag of the hub model; None takes the commit in `revisions`, or else
            ``main``.
        revisions: the commits to keep to; the one found is noted there.

    Raises:
        CheckpointError: `model` is neither a folder nor a hub model that can be fetched, or it is at another
            commit than noted.
    """
    if (folder := local(model, revision)) is not None:
        return folder
    found = snapshot(model, "model", revision, revisions)
    wanted = [name for name in found.files if belongs(name)]
    if not wanted:
        raise CheckpointError(
            f"{model}: none of {', '.join(PATTERNS)} at {found.commit}; {found.how_to_fetch(*PATTERNS)}"
        )
    return found.fetch([*wanted, *(name for name in found.files if name == CARD)])


def local(model: str, revision: str | None = None) -> Path | None:
    """The folder `model`; None for what may be a hub id.

    Raises:
        CheckpointError: neither, or a folder for which a revision was given.
    """
    try:
        folder = Path(model).expanduser()
        found_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of nobody
        raise CheckpointError(f"{shown(model)}: {error}") from None
    if found_folder:
        if revision is not None:
            raise CheckpointError(f"{folder}: a local folder has no revision {revision!r}")
        return folder
    if folder.is_file():
        raise CheckpointError(f"{model}: a file, expected the folder of a model")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model}: no such folder{similar(folder)}")
    return None


class ModelName(NamedTuple):
    """What a model is called, on any machine.

    Attributes:
        name: its hub id, or the name of its folder; None where it has neither.
        revision: the hub id's commit, where that is known.
        license: what its card names, if there is one.
    """

    name: str | None = None
    revision: str | None = None
    license: str | None = None

    @classmethod
    def noted(cls, model: Mapping[str, Any]) -> ModelName:
        """The name that a manifest notes; early versions noted less."""
        return cls(*(model.get(key) for key in cls._fields))

    @property
    def hub_id(self) -> str | None:
        """The name, if it can be one on the hub."""
        return self.name if self.name and re.fullmatch(r"[\w.-]+/[\w.-]+", self.name, re.ASCII) else None

    @classmethod
    def of(cls, place: str | Path) -> ModelName:
        """The name of the model at `place`: a folder, a snapshot in the hub's cache, or a hub id."""
        text = str(place)
        if isinstance(place, str) and _HUB_ID.fullmatch(text) and not os.path.isdir(text):
            return cls(text)
        folder = Path(PureWindowsPath(os.path.abspath(text)).as_posix())  # which knows both kinds of slashes
        snapshots, repository = folder.parent, folder.parent.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            name = repository.name.removeprefix("models--").replace("--", "/")
            return cls(name, folder.name, license_of(Path(place)))
        return cls(folder.name or None, None, license_of(Path(place)))


@dataclass(frozen=True)
class Snapshot:
    """One commit of a hub repository.

    Attributes:
        repo: the hub id.
        kind: ``model`` or ``dataset``.
        commit: its hash.
        files: the names of its files; only of the cached ones where the hub was not asked.
        folder: its folder in the hub's cache; None where the hub was asked.
        revision: the revision asked for, so that the cache notes a branch's commit and finds it offline.
    """

    repo: str
    kind: Kind
    commit: str
    files: tuple[str, ...]
    folder: Path | None
    revision: str

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder that holds these files, fetched where they are not in it yet."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(name) for name in names]
        try:
            folder = Path(
                snapshot_download(
                    self.repo, repo_type=self.kind, revision=self.revision, allow_patterns=patterns
                )
            )
        except Exception as error:
            reason = _first_line(error)
            advice = _how_to_log_in(error)
            raise CheckpointError(f"{self.repo}: cannot be fetched from the hub ({reason}){advice}") from None
        if folder.name != self.commit:
            moved = f"moved from commit {self.commit} to {folder.name} meanwhile"
            raise CheckpointError(f"{self.repo}: {self.revision!r} {moved}; start again")
        return folder

    def how_to_fetch(self, *patterns: str) -> str:
        """Advice for a message about missing files."""
        return (
            _how_to_fetch(self.repo, self.kind, patterns, self.commit)
            if self.folder is not None
            else "the hub has no other files of it"
        )


def snapshot(
    repo: str, kind: Kind, revision: str | None = None, revisions: Revisions | None = None
) -> Snapshot:
    """The commit of a hub repository that is in use, or will be from now on.

    Raises:
        CheckpointError: the repository can neither be fetched nor is it cached, or `revision` is another
            commit than the one noted in `revisions`.
    """
    from huggingface_hub.errors import HFValidationError

    key = repo if kind == "model" else f"datasets/{repo}"
    noted = None if revisions is None else revisions.get(key)
    try:
        found = _find(repo, kind, revision or noted or "main")
    except HFValidationError:
        raise CheckpointError(f"{shown(repo)}: neither a folder nor a possible name on the hub") from None
    if noted is not None and found.commit != noted:
        raise CheckpointError(
            f"{repo}: revision {revision!r} is commit {found.commit}, but commit {noted} is in use"
        )
    if revisions is not None:
        revisions[key] = found.commit
    return found


def _find(repo: str, kind: Kind, revision: str) -> Snapshot:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants

    if offline():
        found = _cached(repo, kind, revision)
        if found is None:
            where = f"not in the hub's cache ({constants.HF_HUB_CACHE}) at revision {revision!r}, and offline"
            patterns = PATTERNS if kind == "model" else ()
            advice = _how_to_fetch(repo, kind, patterns, None if revision == "main" else revision)
            raise CheckpointError(f"{repo}: {where}; {advice}")
        return found
    try:
        api = HfApi()
        info: ModelInfo | DatasetInfo = (api.model_info if kind == "model" else api.dataset_info)(
            repo, revision=revision
        )
    # The hub's client lets the errors of its HTTP library through, and has changed that library twice.
    except Exception as error:
        found, reason = _cached(repo, kind, revision), _first_line(error)
        if found is None:
            elsewhere = "is not a local folder and " if kind == "model" else ""
            advice = similar(Path(repo)) or _how_to_log_in(error)
            raise CheckpointError(
                f"{repo}: {elsewhere}cannot be fetched from the hub ({reason}){advice}"
            ) from None
        cached = "%s: the hub cannot be asked (%s); taking commit %s from the cache"
        logger.warning(cached, repo, reason, found.commit)
        return found
    return Snapshot(
        repo, kind, str(info.sha), tuple(file.rfilename for file in info.siblings or ()), None, revision
    )


def _cached(repo: str, kind: Kind, revision: str) -> Snapshot | None:
    """The cached files of a repository at a commit; for a branch or tag, the commit it last stood for."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    reference = storage / "refs" / revision
    inside = ".." not in reference.parts and not Path(revision).is_absolute()
    with naming(reference):
        known = inside and reference.is_file()
        commit = reference.read_text(errors="replace").strip() if known else revision
        folder = storage / "snapshots" / commit
        if "/" in commit or commit in ("", ".", "..") or not folder.is_dir():
            return None
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Snapshot(repo, kind, commit, tuple(files), folder, revision)


def _how_to_fetch(repo: str, kind: Kind, patterns: Sequence[str], revision: str | None) -> str:
    command = ["hf", "download", repo, *(("--repo-type", "dataset") if kind == "dataset" else ())]
    command += [word for pattern in patterns for word in ("--include", pattern)]
    command += ["--revision", revision] if revision else []
    return f"fetch it where there is a network connection: {shlex.join(command)}"


def _how_to_log_in(error: Exception) -> str:
    """Advice where the hub hides a repository, or keeps its files, from those that it does not know."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if not isinstance(error, RepositoryNotFoundError):  # one that is gated, too
        return ""
    return "; for a private or gated repository run `hf auth login` first"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
