"""What sentence-transformers keeps in folders of its own goes along with the base."""

from __future__ import annotations

import pytest
import torch
from small_minilm import write_model

import mingle
from mingle.io.base_files import base_files
from mingle.io.files import CheckpointError
from mingle.io.merger_folder import foreign


@pytest.fixture
def base(tmp_path):
    """An encoder that is asked to pool with its first token."""
    folder = write_model(tmp_path / "encoder")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (folder / "1_Pooling" / "notes.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def merger(base):
    merger = mingle.Merger(base, "average")
    tuned = {name: tensor + 0.01 for name, tensor in merger.base.state_dict().items()}
    merger.add("one", tuned, None)
    return merger


def test_only_the_settings_of_modules_belong_to_the_base(base):
    names = {path.relative_to(base).as_posix() for path in base_files(base)}
    assert names == {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    }


def test_a_saved_merger_pools_as_its_base_does(merger, tmp_path):
    merger.save_pretrained(tmp_path / "saved")
    again = mingle.Merger.from_pretrained(tmp_path / "saved")
    assert again.base.sentence_pooling == "cls"
    for name, tensor in merger.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_what_a_killed_save_left_of_them_is_ours_and_nothing_else_is(merger, tmp_path):
    merger.save_pretrained(tmp_path / "saved")
    for name in ("README.md", "manifest.json"):  # they are written last
        (tmp_path / "saved" / name).unlink()
    assert foreign(tmp_path / "saved") is None
    (mine,) = (tmp_path / "saved").glob("base-*/1_Pooling")
    (mine / "mine.json").write_text("{}")
    assert foreign(tmp_path / "saved") == mine / "mine.json"


def test_an_export_pools_as_the_base_does(merger, tmp_path):
    merger.export(tmp_path / "exported")
    assert mingle.tasks.of(tmp_path / "exported").load(tmp_path / "exported").sentence_pooling == "cls"


def test_what_a_killed_export_left_of_them_is_cleared_away(merger, tmp_path):
    left = tmp_path / ".mingle-export-exported" / "1_Pooling"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    merger.export(tmp_path / "exported")
    mine = tmp_path / ".mingle-export-other" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="notes.txt: in the way of an export"):
        merger.export(tmp_path / "other")
