"""Plain models that are written tensor by tensor, against those that a merger in memory writes."""

from __future__ import annotations

import pytest
import torch
from live_memory import peak_bytes
from streamed_models import SIZES, models, save_tuned
from tiny_merge import contents
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import mingle
from mingle.cli import main
from mingle.io import export, lazy_tensors
from mingle.io.safetensors import CheckpointReader
from mingle.merging.streamed import StreamedMerger
from mingle.runs import merge
from mingle.tasks.base import TaskType

TASKS = ("one", "two")
OPTIONS = {
    "mingle": {"steps": 0, "rank": 4},
    "mass": {"rank": 4},
    "mingle-light": {"gates": "static", "rank": 4},
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merges of two models by kind and method, each made once."""
    folders = {}

    def make(kind, method):
        if (kind, method) in folders:
            return folders[kind, method]
        place = tmp_path_factory.mktemp(f"{kind}-{method}")
        model = models(kind)
        model.save_pretrained(place / "base")
        merger = StreamedMerger(place / "base", method, **OPTIONS.get(method, {}))
        save_tuned(place, model, TASKS, ["1GB"] * 2)
        for name in TASKS:
            merger.add(name, place / name, place / "merged")
        return folders.setdefault((kind, method), place / "merged")

    return make


@pytest.mark.parametrize(
    ("kind", "method", "task"),
    [
        ("llama", "average", None),
        ("mixtral", "opcm", None),
        ("gpt2", "task-arithmetic", None),
        ("bert", "average", "one"),
        ("llama", "mingle", "two"),
        ("gpt2", "mingle", "one"),
        ("bert", "mass", "two"),
        ("llama", "mingle-light", None),
    ],
)
def test_exports_hold_the_bits_of_those_in_memory(merged, kind, method, task, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 200)
    write, folder = export.write_model, merged(kind, method)

    def in_shards(*arguments):
        write(*arguments, shard_bytes=9000)

    monkeypatch.setattr(export, "write_model", in_shards)
    mingle.Merger.from_pretrained(folder).export(tmp_path / "memory" / "plain", task)
    monkeypatch.setattr(TaskType, "load", None)
    monkeypatch.setattr(mingle.Merger, "from_pretrained", None)
    words = ["export", str(folder), "--out", str(tmp_path / "files" / "plain")]
    assert main(words + (["--task", task] if task else [])) == 0
    assert len(list((tmp_path / "files/plain").glob("*.safetensors"))) > 1
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")


def test_what_is_written_is_the_model_of_the_task(merged, tmp_path):
    folder = merged("llama", "mingle")
    merger = StreamedMerger.from_pretrained(folder)
    assert merger.exportable()
    merger.export(folder, tmp_path / "plain", "two")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj"
    expert = mingle.Merger.from_pretrained(folder).method.adapter(1)[name]
    update = plain.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(update, expert.B @ expert.A, rtol=0, atol=1e-6)
    assert update.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "method", "task"),
    [
        ("llama", "mingle", None),
        ("llama", "average", "one"),
        ("llama", "mingle", "three"),
        ("bert", "average", None),
    ],
)
def test_requests_that_make_no_sense_are_refused_in_the_same_words(merged, kind, method, task, tmp_path):
    folder, said = merged(kind, method), []
    for write in (
        lambda: mingle.Merger.from_pretrained(folder).export(tmp_path / "memory", task),
        lambda: StreamedMerger.from_pretrained(folder).export(folder, tmp_path / "files", task),
    ):
        with pytest.raises(ValueError, match="task|plain weights") as refusal:
            write()
        said.append(str(refusal.value))
    assert said[0] == said[1]
    assert not (tmp_path / "files").exists()


def test_a_merge_whose_suite_folds_means_is_exported_with_a_model(merged, tmp_path, monkeypatch):
    assert merge._exporting(merged("llama", "mingle"), "two") is not None
    routed = mingle.Merger(merged("llama", "average").parent / "base", "mingle", rank=2, steps=1)
    routed.add("one", merged("llama", "average").parent / "one", {"input_ids": torch.randint(40, (4, 5))})
    routed.save_pretrained(tmp_path / "adapted")
    assert merge._exporting(tmp_path / "adapted", "one") is None


@pytest.mark.parametrize("method", ["average", "mingle"])
def test_no_more_than_a_tensor_of_the_model_is_in_memory(method, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "BLOCK_ENTRIES", 1 << 13)
    sizes = SIZES | dict(hidden_size=64, num_hidden_layers=6, intermediate_size=192, vocab_size=4000)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    model.model.layers[0].mlp.up_proj.weight.data *= 1.25
    model.save_pretrained(tmp_path / "one")
    merger = StreamedMerger(tmp_path / "base", method, **OPTIONS.get(method, {}))
    merger.add("one", tmp_path / "one", tmp_path / "merged")
    task = "one" if method == "mingle" else None
    found = peak_bytes(lambda: merger.export(tmp_path / "merged", tmp_path / "plain", task))
    whole, layer = 4 * sum(tensor.numel() for tensor in model.parameters()), 4 * 64 * 192
    assert 0 < found < 10 * layer < whole / 3
    assert len(CheckpointReader(tmp_path / "plain")) == len(model.state_dict())
