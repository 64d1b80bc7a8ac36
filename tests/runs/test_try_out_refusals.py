"""What cannot be tried or answered, and that nothing is left of it."""

from __future__ import annotations

import played_merges
import pytest
from played_merges import TASKS

from mingle.io.files import CheckpointError
from mingle.merging.merger import Merger
from mingle.options import OptionError
from mingle.runs.play.try_out import TryOut
from mingle.tasks.readers import ReadingError


def test_images_that_cannot_be_read_are_refused(vit, tmp_path):
    try_out, path = TryOut.of(vit("average")), tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ReadingError, match="cannot be read: in no format that Pillow knows"):
        try_out.trial(path, TASKS)
    with pytest.raises(ReadingError, match="there is no image yet"):
        try_out.trial(None, TASKS)


def test_a_task_of_unknown_classes_says_how_to_name_them(tmp_path, base_folder, tuned_folders, picture):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    played_merges.write_processor(folder, 16)
    merger = Merger(folder, "mass", rank=2)
    merger.add("bare", tuned_folders[0])
    merger.save_pretrained(tmp_path / "merged")
    trial = TryOut.of(tmp_path / "merged").trial(picture, ["bare"])
    for answer in (trial.merged, trial.base, trial.experts["bare"]):
        assert "set_classes('bare'" in answer.reason
    assert "set_classes('bare'" in trial.routing.reason


def test_folders_that_nobody_can_try_are_refused(tmp_path, base_folder, tuned_folders, monkeypatch):
    Merger(base_folder, "average").save_pretrained(tmp_path / "empty")
    with pytest.raises(OptionError, match="empty: no task is merged"):
        TryOut.of(tmp_path / "empty")
    merger = Merger(base_folder, "average")
    merger.add("one", tuned_folders[0])
    merger.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no image processor"):
        TryOut.of(tmp_path / "bare")
    monkeypatch.setattr(type(merger.task), "modality", None)
    with pytest.raises(OptionError, match="task type 'clip': its samples are neither images nor texts"):
        TryOut.of(tmp_path / "bare")


def test_nothing_is_left_of_an_answer_that_failed(vit, picture, monkeypatch):
    try_out = TryOut.of(vit("routed"))
    before = try_out.trial(picture, TASKS)
    method = try_out.merger.method
    with monkeypatch.context() as patch:
        patch.setattr(method, "decision", lambda data: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            try_out.trial(picture, TASKS[:1])
    assert method.router.router.among is None
    assert try_out.trial(picture, TASKS) == before
    assert not any(layer._forward_pre_hooks for layer in method.layers.values())
