"""Models that are merged together, in one pass over the tensors, against the same merges one by one."""

from __future__ import annotations

import pytest
import torch
from merge_files import merge_file
from streamed_merges import (
    OPTIONS,
    TASKS,
    assert_same_merge,
    edited,
    from_files,
    interrupted_at,
)
from streamed_models import Interrupted
from tiny_merge import contents
from worlds import world

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.finite import NonFiniteMerge
from mingle.merging.streamed import NewModel, StreamedMerger
from mingle.methods import METHODS

TOGETHER = ("average", "task-arithmetic", "magmax", "consensus-ta", "tsv-m", "iso-c", "wudi", "nufilt")
NORM = "model.layers.1.input_layernorm.weight"


pytestmark = pytest.mark.usefixtures("parts")


def together(folders, method, out, tasks=TASKS, **options):
    merger = StreamedMerger(folders / "base", method, **OPTIONS.get(method, {}), **options)
    merger.add_all([NewModel(name, folders / name) for name in tasks], out)
    return merger


@pytest.mark.parametrize("method", TOGETHER)
def test_a_merge_of_several_models_has_the_bits_of_one_after_another(mixtral, method, tmp_path):
    from_files(mixtral, method, tmp_path / "each")
    together(mixtral, method, tmp_path / "together")
    expected, found = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("each", "together"))
    assert_same_merge(found, expected)


def test_models_join_those_that_are_merged(mixtral, tmp_path):
    from_files(mixtral, "magmax", tmp_path / "each")
    from_files(mixtral, "magmax", tmp_path / "two", TASKS[:1])
    merger = StreamedMerger.from_pretrained(tmp_path / "two")
    merger.add_all([NewModel(name, mixtral / name) for name in TASKS[1:]], tmp_path / "two")
    assert [len(row) for row in merger.matrix] == [1, 2, 3]
    expected, found = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("each", "two"))
    assert_same_merge(found, expected)


def test_a_merge_of_several_models_goes_on_in_the_middle(mixtral, tmp_path, monkeypatch):
    merged, merge = [], METHODS["task-arithmetic"].merge_tensor

    def counted(self, step, found, aside):
        merged.append(step.name)
        return merge(self, step, found, aside)

    monkeypatch.setattr(METHODS["task-arithmetic"], "merge_tensor", counted)
    together(mixtral, "task-arithmetic", tmp_path / "whole")
    calls = []
    for written in (0, 1, 4):
        out = tmp_path / f"{written}"
        with monkeypatch.context() as patch:
            interrupted_at(patch, written)
            with pytest.raises(Interrupted):
                together(mixtral, "task-arithmetic", out)
        assert not (out / "manifest.json").exists()
        merged.clear()
        together(mixtral, "task-arithmetic", out)
        assert contents(out) == contents(tmp_path / "whole")
        calls.append(len(merged))
    assert calls[0] > calls[1] > calls[2] > 0  # of what was finished, nothing is done again


def test_other_models_than_before_start_anew(mixtral, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        with pytest.raises(Interrupted):
            together(mixtral, "average", tmp_path / "merged")
    together(mixtral, "average", tmp_path / "merged", TASKS[:2])
    together(mixtral, "average", tmp_path / "expected", TASKS[:2])
    assert contents(tmp_path / "merged") == contents(tmp_path / "expected")


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_pass(mixtral, size, tmp_path):
    together(mixtral, "average", tmp_path / "alone")
    assert (
        world(size, lambda: together(mixtral, "average", tmp_path / "shared").task_names)
        == [list(TASKS)] * size
    )
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize("method", ["ties", "opcm", "mingle"])
def test_methods_that_look_at_all_tensors_first_take_one_model_after_another(mixtral, method, tmp_path):
    options = {"steps": 0} if method == "mingle" else {}
    with pytest.raises(ValueError, match="'one', 'two', 'three': cannot be merged together"):
        together(mixtral, method, tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_two_models_need_two_names(mixtral, tmp_path):
    with pytest.raises(ValueError, match="'one', 'one': cannot be merged together"):
        together(mixtral, "average", tmp_path / "merged", ["one", "one"])


def test_a_fault_names_its_own_task(mixtral, tmp_path):
    shapes = edited(mixtral / "two", tmp_path / "shapes", lambda t: t.update({NORM: torch.ones(3)}))
    huge = edited(mixtral / "two", tmp_path / "huge", lambda t: t[NORM].fill_(1e6))
    merger = StreamedMerger(mixtral / "base", "task-arithmetic", scaling=1e38)
    for folder, error in ((shapes, (CheckpointError, IncompatibleModel)), (huge, NonFiniteMerge)):
        models = [NewModel("one", mixtral / "one"), NewModel("two", folder), NewModel("three", folder)]
        with pytest.raises(error, match="task 'two'"):
            merger.add_all(models, tmp_path / "merged")
        assert merger.task_names == [] and not (tmp_path / "merged/manifest.json").exists()


@pytest.mark.parametrize(("keep", "calls"), [(1, [3]), (2, [1, 1, 1])])
def test_the_command_merges_together_where_nothing_between_is_kept(
    mixtral, keep, calls, tmp_path, monkeypatch
):
    found, add_all = [], StreamedMerger.add_all

    def counted(self, models, folder, **options):
        found.append(len(models))
        add_all(self, models, folder, **options)

    monkeypatch.setattr(StreamedMerger, "add_all", counted)
    experts = {name: mixtral / name for name in TASKS}
    file = merge_file(tmp_path, mixtral / "base", experts, "average", keep=keep)
    assert main(["merge", str(file), "--out", str(tmp_path / "merged")]) == 0
    assert found == calls
    assert main(["merge", str(file), "--out", str(tmp_path / "merged")]) == 0
    assert found == calls  # everything is merged
    monkeypatch.undo()
    from_files(mixtral, "average", tmp_path / "each")
    expected, merged = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("each", "merged"))
    assert_same_merge(merged, expected)
    assert set(merged.metadata["inputs"]) == set(TASKS)
