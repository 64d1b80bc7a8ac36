"""A merger on disk: stopping changes no bit, damage is named, an interruption loses nothing."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
from small_merges import NAMES, SETTINGS, add, everything, merge, same_bits
from transformers import CLIPConfig, CLIPModel

import mingle
from mingle.io.files import CheckpointError


@pytest.mark.parametrize("method", ["mingle", "mingle-light", "opcm", "average", "individual"])
@pytest.mark.parametrize("include_base", [True, False])
def test_stopping_and_going_on_gives_the_same_bits(
    base_model, tuned_states, samples, tmp_path, method, include_base
):
    options = SETTINGS if method.startswith("mingle") else {}
    merger = mingle.Merger(base_model, method, seed=7, **options)
    for i in range(2):
        add(merger, i, tuned_states, samples)
        merger.evaluate(dict(zip(NAMES, samples, strict=True)))
    merger.save_pretrained(tmp_path, include_base=include_base)
    resumed = mingle.Merger.from_pretrained(tmp_path, base=None if include_base else base_model)
    assert resumed.matrix == merger.matrix
    assert resumed.task_names == NAMES[:2]
    for m in (merger, resumed):
        add(m, 2, tuned_states, samples)
    same_bits(merger.model.state_dict(), resumed.model.state_dict())
    merger.save_pretrained(tmp_path / "a")
    resumed.save_pretrained(tmp_path / "b")
    names = [
        sorted(str(p.relative_to(tmp_path / d)) for p in (tmp_path / d).rglob("*") if p.is_file())
        for d in "ab"
    ]
    assert names[0] == names[1]  # files are named by their content
    if method.startswith("mingle"):
        same_bits(everything(merger), everything(resumed))


def test_saving_again_writes_only_what_is_new(base_model, tuned_states, samples, tmp_path):
    merger = merge(base_model, tuned_states, samples, count=2)
    merger.save_pretrained(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(before) == 3
    add(merger, 2, tuned_states, samples)
    merger.save_pretrained(tmp_path)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert {p: t for p, t in after.items() if p in before} == before
    assert len(after) == 4


def test_broken_base_folders_are_refused(base_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def copy(name, change=lambda tensors: None, config=lambda values: None):
        folder = tmp_path / name
        folder.mkdir()
        tensors, values = (
            load_file(base_folder / "model.safetensors"),
            json.loads((base_folder / "config.json").read_text()),
        )
        change(tensors)
        config(values)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    mingle.Merger(copy("whole"), "average")
    with pytest.raises(
        CheckpointError,
        match=r"visual_projection.weight.*1 of 512 values are not finite, the first at \(3, 5\)",
    ):
        mingle.Merger(
            copy("nan", lambda tensors: tensors["visual_projection.weight"][3, 5].fill_(float("nan"))),
            "average",
        )
    with pytest.raises(CheckpointError, match="'logit_scale' of a CLIPModel is missing"):
        mingle.Merger(copy("cut", lambda tensors: tensors.pop("logit_scale")), "average")
    with pytest.raises(CheckpointError, match=r"has shape \[16, 32\], config.json says \[24, 32\]"):
        mingle.Merger(copy("wide", config=lambda values: values.update(projection_dim=24)), "average")
    with pytest.raises(CheckpointError, match="config.json: model_type: transformers .* knows no kind 'os'"):
        mingle.Merger(copy("other", config=lambda values: values.update(model_type="os")), "average")
    with pytest.raises(CheckpointError, match="config.json: EncodecModel: mingle has no task type for it"):
        mingle.Merger(
            copy(
                "sound",
                config=lambda values: values.update(model_type="encodec", architectures=["EncodecModel"]),
            ),
            "average",
        )
    with pytest.raises(CheckpointError, match="nowhere"):
        mingle.Merger(tmp_path / "nowhere", "average")


@pytest.fixture
def saved(base_model, tuned_states, samples, tmp_path):
    merge(base_model, tuned_states, samples, count=2).save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_nothing_is_pickled(saved):
    assert {p.suffix for p in saved.rglob("*") if p.is_file() and not p.name.startswith(".")} == {
        ".json",
        ".md",
        ".safetensors",
    }


def test_another_base_is_refused(saved, base_model):
    other = CLIPModel(CLIPConfig.from_dict(base_model.config.to_dict()))
    with pytest.raises(CheckpointError, match="merged into another base model"):
        mingle.Merger.from_pretrained(saved, base=other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest", "version", "outside"])
def test_damaged_folders_are_refused_with_the_file_named(saved, damage):
    victim = sorted((saved / "tasks").iterdir())[1]
    manifest = json.loads((saved / "manifest.json").read_text())
    message = victim.name
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        size = victim.stat().st_size
        victim.write_bytes(victim.read_bytes()[:-5])
        message = f"expected {size} bytes, found {size - 5}"
    elif damage == "flipped":
        data = bytearray(victim.read_bytes())
        data[-3] ^= 1
        victim.write_bytes(data)
    elif damage == "manifest":
        (saved / "manifest.json").write_text('{"format": "mingle-merge", ')
        message = "manifest.json"
    elif damage == "version":
        (saved / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
        message = "format version 99"
    else:
        manifest["tasks"][1]["tensors"]["file"] = "../elsewhere.safetensors"
        (saved / "manifest.json").write_text(json.dumps(manifest))
        message = "elsewhere"
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger.from_pretrained(saved)


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_interrupted_save_leaves_the_old_merge_or_the_new_one(
    base_model, tuned_states, samples, saved, monkeypatch, stop
):
    """Whatever rename the save stops at, the folder loads, and going on gives the bits of the uninterrupted
    merge.
    """
    merger = mingle.Merger.from_pretrained(saved)
    add(merger, 2, tuned_states, samples)
    calls, replace = 0, os.replace

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", failing)
    with contextlib.suppress(KeyboardInterrupt):
        merger.save_pretrained(saved)
    monkeypatch.undo()
    resumed = mingle.Merger.from_pretrained(saved)
    assert resumed.task_names in (NAMES[:2], NAMES)
    if resumed.task_names == NAMES[:2]:
        add(resumed, 2, tuned_states, samples)
    same_bits(everything(merger), everything(resumed))
    resumed.save_pretrained(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    named = {task["tensors"]["file"] for task in manifest["tasks"]}
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert [entry["file"][:16] for entry in manifest["history"]] == ["generations/0001", "generations/0002"]
    named |= {entry["file"] for entry in manifest["history"]}
    assert {name for name in found if not name.startswith(manifest["base"]["folder"])} == named | {
        "README.md",
        "manifest.json",
    }
