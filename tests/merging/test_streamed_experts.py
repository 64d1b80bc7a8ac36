"""Experts that are made layer by layer, from folder to folder, against those that are made in memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from live_memory import peak_bytes
from merge_files import merge_file
from streamed_models import SIZES, Interrupted, models, save_gpt2_and_adapter, save_tuned
from tiny_merge import contents
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import mingle
from mingle.cli import main
from mingle.io import files, lazy_tensors, merger_folder
from mingle.io.files import CheckpointError
from mingle.io.manifest import read_manifest
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging import streamed
from mingle.merging.streamed import StreamedMerger
from mingle.methods.mingle import UNADAPTED, Mingle
from mingle.options import OptionError
from mingle.tasks.base import TaskType

TASKS = ("one", "two", "three")
METHODS = {
    "mingle": {"steps": 0, "rank": 4},
    "mingle-light": {"gates": "static", "rank": 20},
    "mingle-seq": {"steps": 0, "rank": 4, "gate_init": "zeros", "drop_diagonal": True},
    "mass": {"rank": 4},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base and three fine-tuned models of each kind, in shards."""
    made = {}
    for kind in ("llama", "gpt2", "bert"):
        place, model = tmp_path_factory.mktemp(kind), models(kind)
        model.save_pretrained(place / "base", max_shard_size="12KB")
        save_tuned(place, model, TASKS, ["9KB"] * 3)
        made[kind] = place
    return made


@pytest.fixture
def llama(places):
    return places["llama"]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 3000)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 200)


def in_memory(folders, method, out, tasks=TASKS, **options):
    merger = mingle.Merger(folders / "base", method, **METHODS[method] | options)
    for name in tasks:
        merger.add(name, folders / name)
        merger.save_pretrained(out)
    return merger


def from_files(folders, method, out, tasks=TASKS, **options):
    merger = StreamedMerger(folders / "base", method, **METHODS[method] | options)
    for name in tasks:
        merger.add(name, folders / name, out)
    return merger


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "mingle"),
        ("llama", "mingle-light"),
        ("gpt2", "mingle-seq"),
        ("bert", "mingle"),
        ("llama", "mass"),
    ],
)
def test_experts_from_files_leave_the_very_folder_that_those_in_memory_do(
    places, kind, method, parts, tmp_path
):
    folders = places[kind]
    memory = in_memory(folders, method, tmp_path / "memory")
    from_files(folders, method, tmp_path / "files", TASKS[:2])
    StreamedMerger.from_pretrained(tmp_path / "files").add("three", folders / "three", tmp_path / "files")
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")
    found = mingle.Merger.from_pretrained(tmp_path / "files")
    assert all(tensor.equal(memory.model.state_dict()[n]) for n, tensor in found.model.state_dict().items())
    assert all(layer.num_experts == 3 for layer in found.method.layers.values())


def test_half_precision_modules_go_on_from_files(llama, tmp_path):
    half = LlamaForCausalLM.from_pretrained(llama / "base", dtype=torch.bfloat16)
    merger = mingle.Merger(half, "mingle", **METHODS["mingle"])
    merger.add("one", llama / "one")
    merger.save_pretrained(tmp_path)
    StreamedMerger.from_pretrained(tmp_path).add("two", llama / "two", tmp_path)
    merger.add("two", llama / "two")
    found = mingle.Merger.from_pretrained(tmp_path).model.state_dict()
    assert all(tensor.equal(merger.model.state_dict()[name]) for name, tensor in found.items())
    assert any(name.endswith(".A") and t.dtype == torch.bfloat16 for name, t in found.items())


def test_what_is_not_adapted_is_said_and_gates_stay_as_they_start(llama, tmp_path):
    merger = in_memory(llama, "mingle", tmp_path, TASKS[:1])
    gates = torch.cat([layer.gate_weight.flatten() for layer in merger.method.layers.values()])
    assert 0.005 < gates.std() < 0.02
    assert not any(layer.gate_bias.any() for layer in merger.method.layers.values())
    assert merger.merged[0].notes[0] == UNADAPTED
    assert not any(basis.numel() for basis in merger.method.bases.values())
    static = in_memory(llama, "mingle-light", tmp_path / "static", TASKS[:1])
    assert UNADAPTED not in static.merged[0].notes
    with pytest.raises(ValueError, match="method 'mingle' needs seed samples, and none were given"):
        mingle.Merger(llama / "base", "mingle").add("one", llama / "one")


def test_a_task_that_changes_no_target_layer_is_skipped_in_the_same_words(llama, tmp_path):
    for merge, out in ((in_memory, "memory"), (from_files, "files")):
        merge(llama, "mingle", tmp_path / out, ["one"])
    memory = mingle.Merger.from_pretrained(tmp_path / "memory")
    memory.add("same", llama / "base")
    memory.save_pretrained(tmp_path / "memory")
    merger = StreamedMerger.from_pretrained(tmp_path / "files")
    merger.add("same", llama / "base", tmp_path / "files")
    merger.add("two", llama / "two", tmp_path / "files")
    memory.add("two", llama / "two")
    memory.save_pretrained(tmp_path / "memory")
    assert "no expert was added" in merger.merged[1].skipped
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def test_adapters_become_experts_from_their_files(tmp_path):
    save_gpt2_and_adapter(tmp_path)
    in_memory(tmp_path, "mingle", tmp_path / "memory", ["one"])
    from_files(tmp_path, "mingle", tmp_path / "files", ["one"])
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def test_broken_off_anywhere_it_goes_on_after_the_last_part(places, tmp_path, monkeypatch, parts):
    folders = places["bert"]
    from_files(folders, "mingle", tmp_path / "start", TASKS[:1])
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    StreamedMerger.from_pretrained(tmp_path / "whole").add("two", folders / "two", tmp_path / "whole")
    whole, start = contents(tmp_path / "whole"), contents(tmp_path / "start")
    expert, done = Mingle.expert, []
    for changes in range(0, 200, 5):  # of the folder
        out = tmp_path / f"{changes}"
        shutil.copytree(tmp_path / "start", out)
        left = [changes]

        def changing(act, left=left):
            def changed(*arguments, **more):
                if not left[0]:
                    raise Interrupted
                left[0] -= 1
                return act(*arguments, **more)

            return changed

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", changing(files.os.replace))
            patch.setattr(type(out), "unlink", changing(type(out).unlink))
            try:
                StreamedMerger.from_pretrained(out).add("two", folders / "two", out)
                break
            except Interrupted:
                pass
        there = contents(out)
        if read_manifest(out)["generation"] == 1:
            assert {name: there[name] for name in start} == start  # the old merge is there as it was
        calls = []

        def counted(self, name, *more, calls=calls):
            calls.append(name)
            return expert(self, name, *more)

        with monkeypatch.context() as patch:
            patch.setattr(Mingle, "expert", counted)
            with merger_folder.writing(out):
                merger = StreamedMerger.from_pretrained(out)
                if len(merger.merged) == 1:
                    merger.add("two", folders / "two", out)
        assert contents(out) == whole, changes
        done.append(len(calls))
    assert done[0] > 5 and done[-1] == 0 and sorted(done, reverse=True) == done
    assert len(set(done)) > 2


def test_what_was_set_aside_goes_where_only_the_very_end_was_interrupted(llama, tmp_path, monkeypatch, parts):
    sweep = merger_folder.sweep

    def interrupted(folder, kept):
        if (folder / "manifest.json").exists():
            raise Interrupted
        sweep(folder, kept)

    with monkeypatch.context() as patch:
        patch.setattr(merger_folder, "sweep", interrupted)
        with pytest.raises(Interrupted):
            from_files(llama, "mingle", tmp_path, ["one"])
    assert any("aside" in name for name in contents(tmp_path))
    with merger_folder.writing(tmp_path):
        pass
    assert not any("aside" in name or "journal" in name for name in contents(tmp_path))


FAULTS = {
    "merged": "model.layers.1.mlp.up_proj.weight",
    "not merged": "model.layers.1.input_layernorm.weight",
    "large": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("name", FAULTS.values(), ids=FAULTS)
def test_models_that_are_not_finite_are_refused_in_the_same_words(llama, name, parts, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llama / "two", dtype=torch.float32)
    model.get_parameter(name).data[-1] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    memory = in_memory(llama, "mingle", tmp_path / "memory", ["one"])
    merger = from_files(llama, "mingle", tmp_path / "files", ["one"])
    before, said = contents(tmp_path / "files"), []
    for add in (
        lambda: memory.add("two", tmp_path / "broken"),
        lambda: merger.add("two", tmp_path / "broken", tmp_path / "files"),
    ):
        with pytest.raises((IncompatibleModel, CheckpointError)) as refusal:
            add()
        said.append(str(refusal.value))
    assert said[0] == said[1] and said[0].startswith("task 'two': ")
    there = contents(tmp_path / "files")
    assert {file: there[file] for file in before} == before


def test_files_that_are_not_the_experts_of_this_method_are_refused(llama, tmp_path):
    from_files(llama, "mingle", tmp_path, ["one"])
    manifest = (tmp_path / "manifest.json").read_text()
    for old, new, reason in (
        ('"rank": 4', '"rank": 5', r"expected \[5, 16\]"),
        ('"method": "mingle"', '"method": "mingle-light"', "there is no place for"),
    ):
        (tmp_path / "manifest.json").write_text(manifest.replace(old, new))
        with pytest.raises(CheckpointError, match=f"do not fit the method 'mingle.*{reason}"):
            StreamedMerger.from_pretrained(tmp_path)


def test_commands_make_experts_without_a_model_and_adapt_later_tasks(llama, tmp_path, monkeypatch, capsys):
    in_memory(llama, "mingle", tmp_path / "memory", reduce="sample")
    names = {name: llama / name for name in TASKS[:2]}
    file = merge_file(tmp_path, llama / "base", names, "mingle", rank=4, adapt={"steps": 0})
    monkeypatch.setattr(TaskType, "load", None)
    assert main(["merge", str(file), "--out", str(tmp_path / "files")]) == 0
    add = ["add", str(tmp_path / "files"), "--name", "three", "--model", str(llama / "three")]
    shutil.copytree(tmp_path / "files", tmp_path / "before")
    assert main(add) == 0
    monkeypatch.undo()
    expected, found = (mingle.Merger.from_pretrained(tmp_path / name) for name in ("memory", "files"))
    assert all(t.equal(expected.model.state_dict()[n]) for n, t in found.model.state_dict().items())
    assert sum(p.numel() for p in mingle.load(tmp_path / "files").parameters())
    # and next month
    samples = {"input_ids": torch.randint(40, (8, 6))}
    adapted = mingle.Merger.from_pretrained(tmp_path / "before", adapt={"steps": 3, "lr": 0.01})
    report = adapted.add("three", llama / "three", samples)
    assert len(report.trace.loss) == 3
    layers = list(adapted.method.layers.values())
    assert any(not layer.gate_bias.eq(0).all() for layer in layers)
    assert all(layer.frozen_gate_bias.eq(0).all() for layer in layers)
    assert adapted.options.steps == 3 and any(basis.shape[1] for basis in adapted.method.bases.values())
    capsys.readouterr()
    assert main([*add[:1], str(tmp_path / "before"), *add[2:], "--set", "steps=3"]) == 2
    assert "needs seed samples" in capsys.readouterr().out


def test_only_the_adaptation_may_change_later(llama, tmp_path):
    in_memory(llama, "mingle", tmp_path, ["one"])
    with pytest.raises(
        OptionError, match="'rank' stays as the merge was begun with; what may change is steps, lr"
    ):
        mingle.Merger.from_pretrained(tmp_path, adapt={"rank": 3})
    with pytest.raises(OptionError, match="steps: 'many' is not of type int"):
        mingle.Merger.from_pretrained(tmp_path, adapt={"steps": "many"})


def test_a_merge_without_samples_is_told_how_to_go_without(llama, tmp_path, capsys):
    assert main(["check", str(merge_file(tmp_path, llama / "base", {"one": llama / "one"}, "mingle"))]) == 2
    assert "with adapt: {steps: 0} it needs none either" in " ".join(capsys.readouterr().out.split())
    assert main(["check", str(merge_file(tmp_path, llama / "base", {"one": llama / "one"}, "routed"))]) == 2
    assert "steps: 0" not in capsys.readouterr().out


def test_no_more_than_a_layer_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 1 << 14)
    sizes = SIZES | dict(hidden_size=64, num_hidden_layers=6, intermediate_size=192, vocab_size=9000)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
        model.model.layers[0].mlp.up_proj.weight.data *= 1.25
    merger = from_files(tmp_path, "mingle", tmp_path / "merged", ["one"])
    found = peak_bytes(lambda: merger.add("two", tmp_path / "two", tmp_path / "merged"))
    whole, layer = 4 * sum(tensor.numel() for tensor in model.parameters()), 4 * 64 * 192
    assert found < (1 << 16) + 16 * layer < whole / 3
