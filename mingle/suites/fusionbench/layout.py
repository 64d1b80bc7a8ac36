"""The files of a data set's repository that make up a split: by its card, or else by the files' names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import yaml

from mingle.io import hub
from mingle.io.files import CheckpointError, contained
from mingle.suites.fusionbench.datasets import Source

#: where the hub keeps its own Parquet copy of a data set that was uploaded in another form
CONVERTED = "refs/convert/parquet"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_SPLIT_OF_FILE = re.compile(r"([^/]+?)(?:-\d{5}-of-\d{5}[^/]*)?\.parquet$")


class DatasetError(ValueError):
    """A data set that is not what its task needs.

    The message names the data set, the split and the column or file.
    """


def split_files(source: Source, revisions: hub.Revisions | None) -> tuple[Path, list[str]]:
    """The folder of the snapshot and the names of the split's files in it, fetched where they were missing.

    Raises:
        CheckpointError: the data set can neither be fetched from the hub nor is it cached.
        DatasetError: no such split, or a missing shard.
    """
    found = hub.snapshot(source.repo, "dataset", None, revisions)
    if not any(name.endswith(".parquet") for name in found.files):
        found = _converted(found, source, revisions)
    names = _of_split(source, found)
    _check_shards(names, found, source)
    return found.fetch(names), names


def _converted(original: hub.Snapshot, source: Source, revisions: hub.Revisions | None) -> hub.Snapshot:
    """The hub's own Parquet copy, whose commit is then the one noted."""
    try:
        found = hub.snapshot(source.repo, "dataset", CONVERTED)
    except CheckpointError as error:
        raise DatasetError(
            f"{source.repo}: no Parquet files at {original.commit}, nor under {CONVERTED}: {error}"
        ) from None
    if revisions is not None:
        revisions[f"datasets/{source.repo}"] = found.commit
    return found


def _of_split(source: Source, found: hub.Snapshot) -> list[str]:
    """The files that the data set's card lists for the split, or else those that are named after it."""
    parquets = sorted(name for name in found.files if name.endswith(".parquet"))
    declared = _declared(source, found)
    if declared is not None:
        splits = declared
        names = [
            name
            for name in parquets
            if any(fnmatch(name, pattern) for pattern in declared.get(source.split, ()))
        ]
    else:
        own = [name for name in parquets if source.config in Path(name).parts[:-1]] if source.config else []
        splits = {_split_of(name): () for name in own or parquets}
        names = [name for name in own or parquets if _split_of(name) == source.split]
    if not names:
        advice = found.how_to_fetch(f"*{source.split}-*.parquet", "README.md")
        there = f"it has {', '.join(splits)}" if splits else "it has no Parquet files"
        raise DatasetError(f"{source}: no files of this split at commit {found.commit}; {there}; {advice}")
    return names


def _declared(source: Source, found: hub.Snapshot) -> dict[str, tuple[str, ...]] | None:
    """Split → patterns of its files, by the YAML head of the data set's card; None where it lists none."""
    if "README.md" not in found.files:
        return None
    text = contained(found.fetch(["README.md"]), "README.md").read_text(errors="replace")
    parts = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
    try:
        card = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    configs = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(configs, list):
        return None
    known = {
        config["config_name"]: config
        for config in configs
        if isinstance(config, dict) and "config_name" in config
    }
    chosen = source.config or next(
        (name for name, config in known.items() if config.get("default") or name == "default"), None
    )
    chosen = chosen or (next(iter(known)) if len(known) == 1 else None)
    files = known.get(chosen, {}).get("data_files")
    if not isinstance(files, list) or not all(
        isinstance(entry, dict) and "split" in entry and "path" in entry for entry in files
    ):
        return None
    paths = {str(entry["split"]): entry["path"] for entry in files}
    return {split: tuple(path) if isinstance(path, list) else (str(path),) for split, path in paths.items()}


def _split_of(name: str) -> str:
    """The split that a file's name tells.

    ``data/test-00000-of-00001-<hash>.parquet`` and ``default/test/0000.parquet`` belong to ``test``.
    """
    stem = _SPLIT_OF_FILE.search(name)
    own = stem.group(1) if stem else name
    return Path(name).parent.name if own.isdigit() else own


def _check_shards(names: Sequence[str], found: hub.Snapshot, source: Source) -> None:
    """Raise `DatasetError` unless every shard, such as ``-00000-of-00003``, is there up to the last."""
    numbered = [(match.group(1), match.group(2)) for name in names if (match := _SHARD.search(name))]
    expected = {(f"{i:05d}", total) for _, total in numbered for i in range(int(total))}
    missing = sorted(expected - set(numbered))
    if missing:
        listed = ", ".join(f"{i}-of-{total}" for i, total in missing)
        patterns = [f"*-{i}-of-{total}*.parquet" for i, total in missing]
        raise DatasetError(
            f"{source}: shards {listed} are missing beside {names[0]}; {found.how_to_fetch(*patterns)}"
        )
