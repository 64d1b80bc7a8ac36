"""Merges that go tensor by tensor, and the same merges in memory."""

from __future__ import annotations

import shutil

from streamed_models import Interrupted, models, save_tuned

import mingle
from mingle.io import journal
from mingle.merging.streamed import StreamedMerger

OPTIONS = {
    "consensus-ta": {"masks": "all"},
    "wudi": {"steps": 5},
    "nufilt": {"steps": 3, "r_p": 4, "r_v": 2, "r_l": 3},
}
TASKS = ("one", "two", "three")


def folders_of(kind, place):
    """A base and three fine-tuned models in shards, of which no two have the same."""
    model = models(kind, **({"tie_word_embeddings": True} if kind == "mixtral" else {}))
    model.save_pretrained(place / "base", max_shard_size="12KB")
    save_tuned(place, model, TASKS, ["8KB", "11KB", "14KB"])
    return place


def in_memory(folders, method, out, tasks=TASKS, **options):
    merger = mingle.Merger(folders / "base", method, **OPTIONS.get(method, {}), **options)
    for name in tasks:
        merger.add(name, folders / name)
        merger.save_pretrained(out)
    return merger


def from_files(folders, method, out, tasks=TASKS, **options):
    merger = StreamedMerger(folders / "base", method, **OPTIONS.get(method, {}), **options)
    for name in tasks:
        merger.add(name, folders / name, out)
    return merger


def assert_same_merge(found, expected):
    """The bits of all that is kept, of the model, and of what is known of the tasks."""
    for mine, other in (
        (found.method.state_tensors(), expected.method.state_tensors()),
        (found.model.state_dict(), expected.model.state_dict()),
    ):
        assert mine.keys() == other.keys()
        assert all(t.dtype == other[n].dtype and t.equal(other[n]) for n, t in mine.items())
    assert found.merged == expected.merged
    assert (found.matrix, found.unknown) == (expected.matrix, expected.unknown)
    for mine, other in zip(found.merged, expected.merged, strict=True):
        assert all(tensor.equal(other.tensors[name]) for name, tensor in mine.tensors.items())


def interrupted_at(monkeypatch, written):
    """Break off when that many parts are written."""
    remaining, write = [written], journal.write_tensors

    def writing(path, tensors):
        if not remaining[0]:
            raise Interrupted
        remaining[0] -= 1
        return write(path, tensors)

    monkeypatch.setattr(journal, "write_tensors", writing)


def edited(folder, target, change):
    """A copy of a model's folder in one file, its tensors changed."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()
    }
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
