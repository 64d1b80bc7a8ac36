"""Merges that go tensor by tensor, from folder to folder, against the same merges in memory."""

from __future__ import annotations

import pytest
import torch
from merge_files import merge_file
from streamed_merges import TASKS, assert_same_merge, folders_of, from_files, in_memory
from streamed_models import save_gpt2_and_adapter
from tiny_merge import contents
from transformers import MixtralForCausalLM

import mingle
from mingle.cli import main
from mingle.io import generations
from mingle.io.manifest import read_manifest
from mingle.merging import streamed
from mingle.merging.streamed import StreamedMerger
from mingle.methods import METHODS
from mingle.methods.tensorwise import TensorMethod
from mingle.tasks.base import TaskType

STREAMED = [name for name, method in METHODS.items() if issubclass(method, TensorMethod)]


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def folders(request, tmp_path_factory):
    return folders_of(request.param, tmp_path_factory.mktemp(request.param))


def test_methods_that_go_tensor_by_tensor():
    names = "average task-arithmetic ties magmax consensus-ta opcm tsv-m iso-c wudi nufilt"
    assert set(names.split()) == set(STREAMED)


@pytest.mark.parametrize("method", ["ties", "opcm", "tsv-m", "nufilt"])
def test_a_merge_from_files_leaves_the_very_folder_that_one_in_memory_does(folders, method, tmp_path):
    in_memory(folders, method, tmp_path / "memory", TASKS[:2])
    from_files(folders, method, tmp_path / "files", TASKS[:2])
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


@pytest.mark.parametrize("method", STREAMED)
def test_merges_in_many_parts_have_the_same_bits_whoever_goes_on(mixtral, method, parts, tmp_path):
    expected = in_memory(mixtral, method, tmp_path / "memory")
    from_files(mixtral, method, tmp_path / "files", TASKS[:2])
    manifest = read_manifest(tmp_path / "files")
    assert len(manifest["state"]) > 4
    assert {name for name in generations.names(tmp_path / "files", manifest) if "state" in name} == {
        path.name for path in (tmp_path / "files").glob("state-*")
    }
    again = mingle.Merger.from_pretrained(tmp_path / "files")
    again.add(TASKS[2], mixtral / TASKS[2])
    assert_same_merge(again, expected)
    StreamedMerger.from_pretrained(tmp_path / "files").add(TASKS[2], mixtral / TASKS[2], tmp_path / "files")
    assert_same_merge(mingle.Merger.from_pretrained(tmp_path / "files"), expected)


def test_what_a_merger_in_memory_has_saved_goes_on_from_files(mixtral, tmp_path):
    in_memory(mixtral, "opcm", tmp_path / "whole")
    in_memory(mixtral, "opcm", tmp_path / "files", TASKS[:2])
    StreamedMerger.from_pretrained(tmp_path / "files").add("three", mixtral / "three", tmp_path / "files")
    assert contents(tmp_path / "files") == contents(tmp_path / "whole")


def test_mergers_of_half_precision_modules_go_on_from_files(mixtral, tmp_path):
    """Their base is rounded to bfloat16 when it is loaded again, and what they serve is rounded once."""
    half = MixtralForCausalLM.from_pretrained(mixtral / "base", dtype=torch.bfloat16)
    merger = mingle.Merger(half, "opcm")
    merger.add("one", mixtral / "one")
    merger.save_pretrained(tmp_path)
    StreamedMerger.from_pretrained(tmp_path).add("two", mixtral / "two", tmp_path)
    merger.add("two", mixtral / "two")
    found = mingle.Merger.from_pretrained(tmp_path)
    assert_same_merge(found, merger)
    assert next(found.model.parameters()).dtype == torch.bfloat16


def test_adapters_are_merged_from_their_files(tmp_path):
    save_gpt2_and_adapter(tmp_path)
    in_memory(tmp_path, "opcm", tmp_path / "memory", ["one"])
    from_files(tmp_path, "opcm", tmp_path / "files", ["one"])
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def test_commands_load_no_model_where_none_is_needed(mixtral, tmp_path, monkeypatch):
    in_memory(mixtral, "ties", tmp_path / "memory", scaling=0.3, density=0.2)
    file = merge_file(tmp_path, mixtral / "base", {name: mixtral / name for name in TASKS[:2]}, "ties")
    monkeypatch.setattr(TaskType, "load", None)
    assert main(["merge", str(file), "--out", str(tmp_path / "files")]) == 0
    assert main(["merge", str(file), "--out", str(tmp_path / "files")]) == 0
    assert main(["add", str(tmp_path / "files"), "--name", "three", "--model", str(mixtral / "three")]) == 0
    assert main(["inspect", str(tmp_path / "files")]) == 0
    monkeypatch.undo()
    expected, found = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("memory", "files"))
    assert_same_merge(found, expected)
    assert set(found.metadata["inputs"]) == set(TASKS)
    assert main(["export", str(tmp_path / "files"), "--out", str(tmp_path / "plain")]) == 0


def test_task_types_that_load_models_in_their_own_way_are_merged_in_memory(mixtral):
    class Changing(mingle.tasks.get("causal-lm").__class__):
        def load(self, folder):
            return super().load(folder).double()

    base = mingle.tasks.get("causal-lm").skeleton(mixtral / "base")

    def streams(method, task, **options):
        return streamed.streams(METHODS[method], METHODS[method].Options(**options), task, base)

    causal = mingle.tasks.get("causal-lm")
    assert streams("average", causal) and streams("mingle", causal, steps=0)
    assert not streams("average", Changing()) and not streams("mingle", Changing(), steps=0)
    assert not streams("routed", causal) and not streams("mingle", causal)
    base.register_buffer("counter", torch.zeros(()))
    assert not streams("average", causal)
