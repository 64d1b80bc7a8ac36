"""Exports as adapters, and folders of them, that are refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from adapter_merges import GATED, ROUTED, merger_of
from small_merges import add

import mingle
from mingle.io.files import CheckpointError
from mingle.methods import METHODS


@pytest.fixture
def exported(base_model, tuned_states, samples, tmp_path):
    merger_of(base_model, "mingle", tuned_states, samples).export(tmp_path / "out", format="peft")
    return tmp_path / "out"


def edit(folder, change):
    said = json.loads((folder / "router.json").read_text())
    change(said)
    (folder / "router.json").write_text(json.dumps(said))


def two_layers(said):
    """Another set of layers than that of the tensors."""
    said["options"]["layers"] = ["q_proj", "k_proj"]


def without_the_last(said):
    for key in ("tasks", "matrix", "unknown"):
        said[key].pop()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_every_method_exports_adapters_or_says_why_not(base_model, tuned_states, samples, tmp_path):
    for method in METHODS:
        merger = mingle.Merger(base_model, method, **(ROUTED if method == "routed" else {}))
        if method in GATED:
            with pytest.raises(ValueError, match="no expert was merged yet"):
                merger.export(tmp_path / "out", format="peft")
            continue
        merger = mingle.Merger(
            base_model, method, **({"steps": 1} if hasattr(merger.options, "steps") else {})
        )
        add(merger, 0, tuned_states, samples)
        reason = "task arithmetic, which is not of low rank" if method == "wemoe" else "no low-rank expert"
        with pytest.raises(ValueError, match=f"method '{method}' .*{reason}"):
            merger.export(tmp_path / "out", format="peft")
    merger = merger_of(base_model, "routed", tuned_states, samples)
    with pytest.raises(ValueError, match="'peft2'; did you mean 'peft'"):
        merger.export(tmp_path / "out", format="peft2")
    with pytest.raises(ValueError, match="adapters are exported for all tasks together"):
        merger.export(tmp_path / "out", "one", "peft")
    assert not list(tmp_path.iterdir())


def test_what_is_broken_or_belongs_elsewhere_is_refused_by_name(base_model, exported, tmp_path):
    def refused(match, change):
        folder = tmp_path / "broken"
        shutil.copytree(exported, folder)
        change(folder)
        with pytest.raises(CheckpointError, match=match):
            mingle.Merger.from_adapters(base_model, folder)
        shutil.rmtree(folder)

    refused("one/adapter_model.safetensors: missing, although router.json names it",
            lambda f: (f / "one" / "adapter_model.safetensors").unlink())  # fmt: skip
    refused("router.safetensors: its content is not what router.json says",
            lambda f: flip(f / "router.safetensors"))  # fmt: skip
    refused("two/adapter_model.safetensors: expected .* bytes",
            lambda f: (f / "two" / "adapter_model.safetensors").write_bytes(b"x"))  # fmt: skip
    refused("format version 2, this mingle reads 1", lambda f: edit(f, lambda s: s.update(format_version=2)))
    refused("router.json: unknown method", lambda f: edit(f, lambda s: s.update(method="x")))
    refused("router.json: the whole|not the manifest", lambda f: (f / "router.json").write_text("[]"))
    refused("tasks.0..adapter.file: expected a text of the form",
            lambda f: edit(f, lambda s: s["tasks"][0]["adapter"].update(file="../one/x")))  # fmt: skip
    refused("two of them have the same adapter",
            lambda f: edit(f, lambda s: s["tasks"][0].update(adapter=s["tasks"][1]["adapter"])))  # fmt: skip
    refused("the tensors do not fit the method 'mingle'", lambda f: edit(f, two_layers))
    refused("the tensors do not fit the method 'mingle'",
            lambda f: edit(f, lambda s: s["tasks"][0].update(adapter=None)))  # fmt: skip
    refused("tensor 'tasks/1/.*' belongs to nothing", lambda f: edit(f, without_the_last))
    other = copy.deepcopy(base_model)
    other.logit_scale.data += 1
    with pytest.raises(CheckpointError, match="made for another base model"):
        mingle.Merger.from_adapters(other, exported)


def test_adapters_that_are_no_export_are_refused_with_how_to_merge_them(base_model, exported):
    (exported / "router.json").unlink()
    with pytest.raises(CheckpointError, match="holds the LoRA adapters 'one', 'two', .* merger.add"):
        mingle.Merger.from_adapters(base_model, exported)
    with pytest.raises(CheckpointError, match="is a LoRA adapter by itself, .* merger.add"):
        mingle.Merger.from_adapters(base_model, exported / "one")
    (exported / "empty").mkdir()
    with pytest.raises(CheckpointError, match="does not hold adapters"):
        mingle.Merger.from_adapters(base_model, exported / "empty")
    with pytest.raises(CheckpointError, match="nowhere"):
        mingle.Merger.from_adapters(base_model, exported / "nowhere")
