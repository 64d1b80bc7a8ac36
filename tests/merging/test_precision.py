"""Bases of folders in half precision: loaded, merged, resumed, shared out and exported in it."""

from __future__ import annotations

import copy

import pytest
import torch
from classifiers import NAMES, inputs, made
from classifiers import tuned as other
from safetensors.torch import load_file
from small_merges import SETTINGS, same_bits
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import mingle
from mingle.io.files import CheckpointError
from mingle.merging.sharded import ShardedMerger
from mingle.merging.streamed import StreamedMerger
from mingle.runs import config
from mingle.runs.check import check

HALF = "bfloat16"


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


@pytest.fixture
def folders(tmp_path):
    """Of a base and two models a little apart from it."""
    base = llama()
    places = [tmp_path / name for name in ("base", "one", "two")]
    for seed, place in enumerate(places):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(place)
    return places


def prompts():
    return {"input_ids": torch.randint(1, 32, (6, 5), generator=torch.Generator().manual_seed(3))}


def merged(kind, base, models, method, **more):
    merger = kind(base, method, dtype=HALF, **more)
    for model in models:
        merger.add(model.name, model, prompts())
    return merger


def dtypes(model):
    return {tensor.dtype for tensor in model.state_dict().values()}


@pytest.mark.parametrize("method", ["mingle", "routed", "task-arithmetic"])
def test_a_folder_is_merged_as_a_module_in_half_precision_and_resumed(method, folders, tmp_path):
    base, *models = folders
    options = SETTINGS if method == "mingle" else {}
    whole = merged(mingle.Merger, base, models, method, **options)
    module = mingle.Merger(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), method, **options)
    for model in models:
        module.add(model.name, model, prompts())
    same_bits(whole.model.state_dict(), module.model.state_dict())
    ids = prompts()["input_ids"]
    assert torch.equal(whole.model(ids).logits, module.model(ids).logits)
    first = merged(mingle.Merger, base, models[:1], method, **options)
    first.save_pretrained(tmp_path / "merged")
    resumed = mingle.Merger.from_pretrained(tmp_path / "merged")
    resumed.add(models[1].name, models[1], prompts())
    same_bits(whole.model.state_dict(), resumed.model.state_dict())
    assert torch.equal(whole.model(ids).logits, resumed.model(ids).logits)


def test_what_a_model_computes_for_itself_keeps_its_precision(folders):
    merger = mingle.Merger(folders[0], "average", dtype=HALF)
    assert merger.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert dtypes(merger.model) == {torch.bfloat16}


def test_a_module_is_not_changed():
    base = llama()
    merger = mingle.Merger(base, "average", dtype=HALF)
    assert dtypes(base) == {torch.float32} and dtypes(merger.model) == {torch.bfloat16}


def test_merges_from_files_have_the_same_bits(folders, tmp_path):
    base, *models = folders
    whole = merged(mingle.Merger, base, models, "task-arithmetic")
    merger = StreamedMerger(base, "task-arithmetic", dtype=HALF)
    for model in models:
        merger.add(model.name, model, tmp_path / "merged")
    loaded = mingle.Merger.from_pretrained(tmp_path / "merged")
    same_bits(whole.model.state_dict(), loaded.model.state_dict())
    merger.export(tmp_path / "merged", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}


def test_models_that_stay_in_their_files_have_the_same_bits(folders):
    base, *models = folders
    whole = merged(mingle.Merger, base, models, "mingle", **SETTINGS)
    shared = merged(ShardedMerger, base, models, "mingle", **SETTINGS)
    for i in range(len(models)):
        same_bits(whole.method.task_tensors(i), shared.method.task_tensors(i))


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_samples_in_float32_meet_models_in_half_precision(kind, tmp_path):
    base = made(kind)
    base.save_pretrained(tmp_path)
    merger = mingle.Merger(tmp_path, "mingle", dtype=HALF, **SETTINGS)
    seeds = inputs(base)
    merger.add("one", other(base, NAMES[1]), {**seeds, "class_names": list(NAMES[1])})
    assert len(merger.predict(seeds).label) == len(next(iter(seeds.values())))
    labels = torch.zeros(len(next(iter(seeds.values())))).long()
    assert merger.evaluate({"one": {**seeds, "labels": labels}}).acc is not None


def test_samples_in_float32_meet_models_that_change_none(tmp_path):
    torch.manual_seed(0)
    shape = dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1], image_size=32, num_labels=3)
    base = ConvNextForImageClassification(ConvNextConfig(**shape)).eval()
    base.save_pretrained(tmp_path)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    merger = mingle.Merger(tmp_path, "mingle", dtype=HALF, **SETTINGS)
    images = {"pixel_values": torch.randn(6, 3, 32, 32)}
    merger.add("one", tuned, images)
    assert merger.evaluate({"one": {**images, "labels": torch.zeros(6).long()}}).acc is not None


def test_an_unknown_one_is_refused_by_name(folders):
    with pytest.raises(ValueError, match="dtype 'bfloat'; did you mean 'bfloat16'"):
        mingle.Merger(folders[0], "average", dtype="bfloat")


def written(folders, tmp_path, **more):
    base, *models = folders
    experts = [{"name": model.name, "model": str(model)} for model in models]
    return config.parse({"base": str(base), "method": "average", "experts": experts, **more}, "merge.yaml")


def test_a_file_asks_for_it_and_a_resumed_merge_has_to_ask_for_the_same(folders, tmp_path):
    out = tmp_path / "out"
    plan = check(written(folders, tmp_path, dtype=HALF), out)
    whole = check(written(folders, tmp_path), tmp_path / "other")
    assert plan.fitted.model.state_dict().keys() == whole.fitted.model.state_dict().keys()
    for part in ("base", "merged model", "fine-tuned model"):
        assert 2 * plan.memory()[part] == whole.memory()[part]
    for _ in plan.run():
        pass
    assert dtypes(mingle.Merger.from_pretrained(out).model) == {torch.bfloat16}
    check(written(folders, tmp_path, dtype=HALF), out)
    with pytest.raises(CheckpointError, match="dtype: 'bfloat16' there, 'float32' now"):
        check(written(folders, tmp_path), out)
