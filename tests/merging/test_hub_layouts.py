"""Folders as transformers 5 writes them, as older versions did, and as people leave them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from architectures import built, each_kind, moved
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForPreTraining, MixtralConfig, MixtralForCausalLM

import mingle
from mingle import tasks
from mingle.io.base_files import base_files
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel, first_names
from mingle.merging.finetuned import FineTuned
from mingle.tasks.loading import ModelCheckpoint

KEY = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def edited(folder, change):
    """The folder, its tensors changed by a function of them."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / "model.safetensors")
    return folder


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def in_memory_names(model, folder):
    """The names that the installed transformers has in memory, and no metadata in the file."""
    first = first_names(model)
    saved(model, folder)
    state = {k: v.clone() for k, v in model.state_dict().items() if first[k] == k}
    return edited(folder, lambda _: state)


def every_name(model, folder):
    """Tied tensors under each of their names."""
    return edited(saved(model, folder), lambda _: {k: v.clone() for k, v in model.state_dict().items()})


def without_prefix(model, folder):
    """As the hub has GPT-2: without the model's prefix, with masks that are buffers now."""

    def change(tensors):
        tensors = {name.removeprefix(f"{model.base_model_prefix}."): t for name, t in tensors.items()}
        if model.config.model_type == "gpt2":
            tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        return tensors

    return edited(saved(model, folder), change)


def of_transformers_4(model, folder):
    """Half precision by its former key, settings of generation in config.json, positions and gamma stored."""

    def change(tensors):
        tensors = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
        tensors = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
        inside = next((n.partition("embeddings.")[0] for n in tensors if "embeddings.word" in n), None)
        more = {} if inside is None else {f"{inside}embeddings.position_ids": torch.arange(48)[None]}
        rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
        return tensors | more | ({rotary: torch.ones(4)} if model.config.model_type == "llama" else {})

    edited(saved(model, folder), change)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    config |= {"torch_dtype": "float16", "_name_or_path": "/home/me/model", "transformers_version": "4.30.2"}
    config |= {"max_length": 20, "do_sample": False, "num_beams": 1, "top_k": 50, "pruned_heads": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


LAYOUTS = [saved, in_memory_names, every_name, without_prefix, of_transformers_4, sharded]


@each_kind
def test_a_folder_of_any_age_is_the_same_model(kind, tmp_path):
    base = built(kind)
    tuned = moved(base, 1)
    state, wanted = base.state_dict(), tuned.state_dict()
    for layout in LAYOUTS:
        folder = layout(base, tmp_path / f"base-{layout.__name__}")
        expert = layout(tuned, tmp_path / f"tuned-{layout.__name__}")
        task = tasks.of(folder)
        skeleton, loaded = task.skeleton(folder), task.load(folder)
        assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items()), layout.__name__
        checked, found = FineTuned(expert, skeleton, task), FineTuned(expert, loaded, task)
        values = ModelCheckpoint(folder, skeleton)
        assert checked.left([], values) == found.left([]) != [], layout.__name__
        rest = found.left(found.base)
        assert checked.left(found.base, values) == rest
        if task.name != "clip":  # beside whose vision tower there is a text tower
            assert rest == []
        tensors = {found.prefix + name: tensor for name, tensor in found.tensors().items()} | found.head()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items()), layout.__name__


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "vit", "gpt_neox"])
def test_tensors_in_memory_may_have_the_names_of_files(kind, tmp_path):
    base = built(kind)
    tuned = moved(base, 1)
    tensors = load_file(saved(tuned, tmp_path / "tuned") / "model.safetensors")
    assert set(tensors) - set(tuned.state_dict())
    merger = mingle.Merger(base, "average")
    merger.add("one", tensors)
    wanted = tuned.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in merger.model_for("one").state_dict().items())


def test_experts_are_packed_in_the_order_of_their_numbers(tmp_path):
    settings = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=24, num_key_value_heads=1, num_local_experts=12, **settings)
    )
    merger = mingle.Merger(saved(model, tmp_path / "base"), "average")
    merger.add("one", tmp_path / "base")
    state = merger.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {KEY: t[KEY].index_fill(1, torch.tensor([5]), float("nan"))},
            f"'{KEY}': 16 of 384 values",
        ),
        (lambda t: {n: v for n, v in t.items() if n != KEY}, r"mlp.experts.down_proj.*\[2, 16, 24\]"),
        (lambda t: t | {KEY: t[KEY][:, :5]}, "experts.0.w2.weight' and 2 more do not make .*down_proj'"),
    ],
    ids=["nan", "missing", "another shape"],
)
def test_a_broken_expert_of_a_mixture_is_named(change, message, tmp_path):
    good = saved(built("mixtral"), tmp_path / "good")
    bad = edited(shutil.copytree(good, tmp_path / "bad"), change)
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger(bad, "average")
    with pytest.raises((CheckpointError, IncompatibleModel), match=message):
        mingle.Merger(good, "average").add("one", bad)


@pytest.mark.parametrize("kind", ["text-classification", "sentence-encoder"])
def test_a_bert_with_the_heads_of_its_training_is_a_base(kind, tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = BertForPreTraining(BertConfig(vocab_size=48, **sizes)).eval()
    task = tasks.get(kind)
    loaded = task.load(of_transformers_4(model, tmp_path / "base"))
    tower = loaded.get_submodule(task.tower(loaded)).state_dict()
    wanted = model.bert.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tower.items() if "pooler" not in name)


@pytest.mark.parametrize("by", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_models_are_refused_by_name(by, tmp_path):
    base = saved(built("llama"), tmp_path / "base")
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": by}}
    (other / "config.json").write_text(json.dumps(config))
    message = f"other/config.json: quantization_config is set, by '{by}'.*dequantise the model first"
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger(other, "average")
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger(base, "average").add("one", other)


@pytest.mark.parametrize("kind", ["home-made", "llama"])
def test_code_in_a_folder_is_never_run(kind, tmp_path):
    folder = saved(built("llama"), tmp_path / "base")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind, "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')\n")
    if kind == "llama":
        mingle.Merger(folder, "average").add("one", folder)
        return
    with pytest.raises(
        CheckpointError, match="config.json: model_type: .* knows no kind 'home-made' without code"
    ):
        mingle.Merger(folder, "average")


def test_a_model_for_speech_is_not_taken_for_its_decoder(tmp_path):
    folder = saved(built("llama"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="WhisperForConditionalGeneration: mingle has no task type for it"
    ):
        mingle.Merger(folder, "average")


def test_what_belongs_to_a_model_goes_along_and_nothing_else(tmp_path):
    folder = saved(built("llama"), tmp_path / "base")
    ours = [
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "special_tokens_map.json",
        "spiece.model",
    ]
    ours += [
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "qwen.tiktoken",
        "source.spm",
    ]
    theirs = [
        ".gitattributes",
        "code.py",
        "onnx/config.json",
        "onnx/model.onnx",
        "openvino/a.json",
        "README.md",
    ]
    theirs += ["pytorch_model.bin", "additional_chat_templates/notes.txt", "logs/1.json"]
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    own = {path.relative_to(folder).as_posix() for path in base_files(folder)}
    assert own == {*ours, "config.json", "generation_config.json", "model.safetensors"}
    merger = mingle.Merger(folder, "average")
    merger.add("one", folder)
    merger.save_pretrained(tmp_path / "merged")
    merger.export(tmp_path / "exported")
    (copied,) = (tmp_path / "merged").glob("base-*")
    assert {p.relative_to(copied).as_posix() for p in copied.rglob("*") if p.is_file()} == own
    exported = {p.relative_to(tmp_path / "exported").as_posix() for p in (tmp_path / "exported").rglob("*")}
    assert exported - {"additional_chat_templates"} == own | {"README.md"}


def test_a_pooling_of_a_base_in_memory_is_kept_and_no_note_is_in_a_configuration(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    folder = saved(BertForPreTraining(BertConfig(vocab_size=48, **sizes)).bert, tmp_path / "base")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"embedding_dimension": 16, "pooling_mode": "cls"})
    )
    edited(folder, lambda t: {name: tensor for name, tensor in t.items() if "pooler" not in name})
    base = tasks.of(folder).load(folder)
    merger = mingle.Merger(base, "average", "sentence-encoder")
    merger.add("one", moved(base, 1))
    merger.save_pretrained(tmp_path / "merged")
    merger.export(tmp_path / "exported")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    exported = tasks.of(tmp_path / "exported").load(tmp_path / "exported")
    assert again.model.sentence_pooling == exported.sentence_pooling == "cls"
    known = set(BertConfig().to_dict())
    for config in (again.base_folder / "config.json", tmp_path / "exported" / "config.json"):
        assert set(json.loads(config.read_text())) <= known | {"dtype"}
