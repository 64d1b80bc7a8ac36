"""Merges that are resumed with something else than they were started with."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_merge import TinyMerge, contents

from mingle.io import merger_folder
from mingle.runs import inputs


@pytest.fixture
def tiny(tmp_path: Path) -> TinyMerge:
    """A merge of a and b, to be resumed with c."""
    tiny = TinyMerge(tmp_path)
    tiny.write_config("abc")
    return tiny


def refusal(tiny: TinyMerge) -> str:
    before = contents(tiny.root / "merged")
    assert tiny.merge(tiny.root / "merged")() == 2
    assert contents(tiny.root / "merged") == before
    return " ".join(tiny.said.read_text().split())


def change(model: Path) -> None:
    """One value of a model's file."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["vision_model.post_layernorm.bias"][0] += 1
    save_file(tensors, path, {"format": "pt"})


def test_resuming_with_an_expert_that_changed_since_it_was_merged_is_refused_by_name(tiny: TinyMerge) -> None:
    change(tiny.inputs / "b")
    assert f"expert 'b': the files in {tiny.inputs / 'b'} are not those that were merged" in refusal(tiny)


def test_resuming_with_another_base_is_refused(tiny: TinyMerge) -> None:
    change(tiny.inputs / "base")
    assert f"was started with a base model other than {tiny.inputs / 'base'}" in refusal(tiny)


def test_resuming_with_another_config_lists_every_difference(tiny: TinyMerge) -> None:
    tiny.write_config("ba", method="task-arithmetic", options={"scaling": 0.5}, eval={"batch_size": 7})
    said = refusal(tiny)
    assert "method: 'average' there, 'task-arithmetic' now" in said
    assert "option scaling: None there, 0.5 now" in said
    assert "'batch_size': 128" in said and "'batch_size': 7" in said
    assert "tasks: a, b there, the order is now b, a" in said


def test_an_expert_that_is_yet_to_be_merged_may_change(tiny: TinyMerge) -> None:
    change(tiny.inputs / "c")
    assert tiny.merge(tiny.root / "merged")() == 0


def test_images_that_a_merged_task_gained_or_lost_are_noticed(tmp_path: Path) -> None:
    image = tmp_path / "suite" / "a" / "class" / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"12345")
    (tmp_path / "model").mkdir()
    metadata = {"suite": str(tmp_path / "suite")}
    inputs.note(metadata, "a", tmp_path / "model")

    def changed() -> list[str]:
        return inputs.changed(metadata[inputs.INPUTS], ["a"], {"a": tmp_path / "model"}, metadata["suite"])

    assert changed() == []
    image.write_bytes(b"123456")
    assert changed() == [
        f"samples of 'a': the files in {metadata['suite']} are not those that it was merged with"
    ]
    image.write_bytes(b"12345")
    assert changed() == []
    image.with_name("2.png").touch()
    assert len(changed()) == 1


@pytest.mark.parametrize("noted", [None, {}, [], {"a": 3}], ids=str)
def test_a_merge_that_notes_nothing_of_its_inputs_resumes(tiny: TinyMerge, noted: object) -> None:
    """As those of earlier versions."""
    path = tiny.root / "merged" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["metadata"]["inputs"]
    if noted is not None:
        manifest["metadata"]["inputs"] = noted
    path.write_text(json.dumps(manifest))
    assert tiny.merge(tiny.root / "merged")() == 0, tiny.said.read_text()


@pytest.mark.parametrize("year", [1970, 2100])
def test_clocks_that_jump_change_nothing(tiny: TinyMerge, year: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of the computer nor those that wrote the files."""
    assert tiny.merge(tiny.root / "whole")() == 0
    there = datetime(year, 1, 2).timestamp()
    for path in (*tiny.inputs.rglob("*"), *tiny.root.rglob("*")):
        os.utime(path, (there, there))
    monkeypatch.setattr(time, "time", lambda: there)
    monkeypatch.setattr(time, "time_ns", lambda: int(there * 1e9))
    monkeypatch.setattr("mingle.io.locks.datetime", _Stopped)
    monkeypatch.setattr(_Stopped, "at", there)
    assert tiny.merge(tiny.root / "merged")() == 0
    assert contents(tiny.root / "merged") == contents(tiny.root / "whole")
    assert merger_folder.load(tiny.root / "merged").manifest["metadata"]["inputs"].keys() == set("abc")


class _Stopped(datetime):
    at = 0.0

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(cls.at, tz)  # type: ignore[arg-type]


def test_a_merge_from_which_a_task_left_is_not_taken_for_its_own_beginning(tiny: TinyMerge) -> None:
    """Something of the task is still in it, so it would not end as an uninterrupted merge does."""
    path = tiny.root / "merged" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["removed"] = [{"name": "z", "stays": ["its gates"], "tasks": ["a"]}]
    path.write_text(json.dumps(manifest))
    assert "tasks: z left, and something of what they were stays" in refusal(tiny)
