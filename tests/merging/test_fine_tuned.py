"""Fine-tuned models as users have them: what is merged, what is refused, and what is said of the rest."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fine_tuned_folders import config_file, moved, refused, written
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.runs.check import check
from mingle.runs.config import load

# Settings that change what the weights compute


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 4),
        ("layer_norm_eps", 1e-3),
        ("patch_size", 2),
    ],
)
def test_a_model_with_another_setting_is_refused_with_both_values(
    setting, value, base, tuned, clip_config, tmp_path
):
    before = clip_config["vision_config"][setting]
    changed = clip_config | {"vision_config": clip_config["vision_config"] | {setting: value}}
    message = rf"config.json: {setting} is {value!r} and in the base {before!r}"
    refused(base, written(tmp_path / "whole", tuned, changed), message, tmp_path)
    tower = {name: t for name, t in tuned.items() if name.startswith("vision_model.")}
    alone = changed["vision_config"] | {"model_type": "clip_vision_model"}
    refused(base, written(tmp_path / "tower", tower, alone), message, tmp_path)


def test_a_module_with_another_setting_is_refused(base_model):
    tuned = copy.deepcopy(base_model)
    tuned.config.vision_config.hidden_act = "gelu"
    with pytest.raises(IncompatibleModel, match="hidden_act is 'gelu' and in the base 'quick_gelu'"):
        mingle.Merger(base_model, "average").add("a", tuned)
    with pytest.raises(IncompatibleModel, match="hidden_act"):
        mingle.Merger(base_model, "average").add("a", tuned.vision_model)


def test_settings_of_training_output_and_heads_do_not_matter(base, tuned, clip_config, tmp_path):
    changed = clip_config | {
        "_name_or_path": "elsewhere",
        "dtype": "bfloat16",
        "transformers_version": "4.1.0",
    }
    changed["vision_config"] = clip_config["vision_config"] | {
        "attention_dropout": 0.5,
        "id2label": {"0": "x"},
    }
    changed["text_config"] = clip_config["text_config"] | {"hidden_act": "gelu"}
    expert = written(tmp_path / "a", tuned, changed)
    check(load(config_file(tmp_path, base, {"a": expert})))
    merger = mingle.Merger(base, "individual")
    merger.add("a", expert)
    assert torch.equal(
        merger.model.vision_model.post_layernorm.bias, tuned["vision_model.post_layernorm.bias"]
    )


def test_defaults_that_a_file_leaves_out_are_the_same(base, tuned, clip_config, tmp_path):
    sparse = {"model_type": "clip", "vision_config": dict(clip_config["vision_config"])}
    for name in ("hidden_act", "layer_norm_eps", "num_channels"):
        sparse["vision_config"].pop(name)
    check(load(config_file(tmp_path, base, {"a": written(tmp_path / "a", tuned, sparse)})))


def test_files_written_by_old_versions_note_more_settings(base, tuned, clip_config, tmp_path):
    legacy = {
        "max_length": 20,
        "prefix": None,
        "sep_token_id": None,
        "tie_encoder_decoder": False,
        "top_k": 50,
    }
    old = clip_config | {"vision_config": clip_config["vision_config"] | legacy | {"pruned_heads": {}}}
    check(load(config_file(tmp_path, base, {"a": written(tmp_path / "a", tuned, old)})))
    base = written(tmp_path / "old base", load_file(base / "model.safetensors"), old)
    check(load(config_file(tmp_path, base, {"a": written(tmp_path / "b", tuned, clip_config)})))


def test_another_kind_of_model_is_refused(base, tuned, clip_config, tmp_path):
    expert = written(tmp_path / "a", tuned, clip_config | {"model_type": "siglip"})
    refused(base, expert, "model_type is 'siglip', expected 'clip' or 'clip_vision_model'", tmp_path)


# What is left to the base


@pytest.fixture
def beyond_the_tower(base, tuned, clip_config, tmp_path):
    """A CLIP whose text tower, projection and logit scale were fine-tuned too, with a classifier on top."""
    changed = {
        name: tensor if name.startswith("vision_model.") else tensor + 0.1 for name, tensor in tuned.items()
    }
    changed["classifier.weight"] = torch.ones(3, 32)
    return written(tmp_path / "beyond", changed, clip_config)


def test_parts_outside_the_tower_are_named_by_check_merge_inspect_and_card(
    base, tuned, clip_config, beyond_the_tower, tmp_path, capsys
):
    plain = written(tmp_path / "plain", tuned, clip_config)
    path = config_file(tmp_path, base, {"beyond": beyond_the_tower, "plain": plain})
    left = check(load(path)).left
    assert left.keys() == {"beyond"}
    changed, unknown = left["beyond"]
    assert changed.startswith("changed by fine-tuning and left as in the base: logit_scale, text_model (")
    assert all(part in changed for part in ("text_projection", "visual_projection"))
    assert unknown == "not in the base and left out: classifier"
    assert main(["check", str(path)]) == 0
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    merger = mingle.Merger.from_pretrained(tmp_path / "out")
    assert [task.notes for task in merger.merged] == [[changed, unknown], []]
    merger.export(tmp_path / "exported")
    assert "left out: classifier" in capsys.readouterr().out
    card = (tmp_path / "exported" / "README.md").read_text()
    assert all(line in card for line in (changed, unknown))


def test_another_preparation_of_images_is_named(base, tuned, clip_config, tmp_path):
    base_too = written(tmp_path / "base", load_file(base / "model.safetensors"), clip_config)
    alike, other = (written(tmp_path / name, tuned, clip_config) for name in ("alike", "other"))
    settings = {"size": {"shortest_edge": 16}, "image_mean": [0.5, 0.5, 0.5], "do_normalize": True}
    (base_too / "preprocessor_config.json").write_text(json.dumps(settings))
    (alike / "preprocessor_config.json").write_text(json.dumps(settings | {"size": 16, "crop_size": 16}))
    changed = {"image_processor": settings | {"image_mean": [0.0, 0.0, 0.0]}}
    (other / "processor_config.json").write_text(json.dumps(changed))
    left = check(load(config_file(tmp_path, base_too, {"alike": alike, "other": other}))).left
    line = "its images were prepared otherwise (image_mean is [0.0, 0.0, 0.0], in the base [0.5, 0.5, 0.5])"
    assert left == {"other": [f"{line}; the base's way is kept"]}
    merger = mingle.Merger(base_too, "average")
    assert merger.add("alike", alike).notes == []
    assert merger.add("other", other).notes == left["other"]


def test_an_expert_rounded_to_half_precision_changed_nothing_outside_its_tower(
    base, tuned, clip_config, tmp_path
):
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tuned.items()}
    expert = written(tmp_path / "a", rounded, clip_config)
    assert check(load(config_file(tmp_path, base, {"a": expert}))).left == {}


@pytest.mark.parametrize(
    ("method", "left"), [("mingle", "layer_norm*.bias"), ("nufilt", "mlp.fc2.weight"), ("opcm", None)]
)
def test_tensors_of_the_tower_that_a_method_leaves_to_the_base_are_named(
    method, left, base_model, tuned_states, samples
):
    merger = mingle.Merger(base_model, method, **({} if method == "opcm" else {"steps": 2}))
    notes = merger.add("a", tuned_states[0], {**samples[0].inputs, **samples[0].shared}).notes
    assert bool(notes) == (left is not None)
    if left:
        assert notes[0].startswith("changed by fine-tuning and left as in the base: vision_model.")
    only_merged = dict(base_model.vision_model.state_dict())
    key = "encoder.layers.0.self_attn.q_proj.weight"
    only_merged[key] = tuned_states[0][key]
    assert merger.add("b", only_merged, {**samples[1].inputs, **samples[1].shared}).notes == []


def test_layers_of_an_adapter_that_a_method_leaves_alone_are_named(base_model, samples, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base_model).vision_model, settings)
    model.save_pretrained(tmp_path)
    seeds = {**samples[0].inputs, **samples[0].shared}
    notes = mingle.Merger(base_model, "mingle-light", steps=2).add("a", tmp_path, seeds).notes
    assert notes == [
        "changed by fine-tuning and left as in the base: "
        "vision_model.encoder.layers.*.self_attn.out_proj.weight (2 tensors)"
    ]


# Folders with two models, and files that stand for others


def test_a_model_and_an_adapter_in_one_folder_are_refused(base, tuned, clip_config, tmp_path):
    both = written(tmp_path / "both", tuned, clip_config)
    (both / "adapter_config.json").write_text("{}")
    refused(base, both, "two models, model.safetensors and adapter_config.json", tmp_path)
    whole = written(tmp_path / "base", load_file(base / "model.safetensors"), clip_config)
    save_file({"x": torch.ones(1)}, whole / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="two models"):
        mingle.Merger(whole, "average")
    with pytest.raises(CheckpointError, match="two models"):
        mingle.read_adapter(both)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named_as_such(name, base, tuned, clip_config, tmp_path):
    expert = written(tmp_path / "a", tuned, clip_config)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 605156676\n"
    (expert / name).write_text(pointer)
    refused(base, expert, f"{name}: a Git LFS pointer.*git lfs pull", tmp_path)


# Weights that are not finite


@pytest.mark.parametrize("form", ["folder", "module", "state"])
def test_nan_weights_are_found_with_model_tensor_count_and_first_index(
    form, base, base_model, tuned, clip_config, tmp_path
):
    name = "vision_model.post_layernorm.weight"
    tuned[name][[4, 9]] = float("nan")
    whole = CLIPModel(base_model.config)
    whole.load_state_dict(tuned)
    models = {"folder": written(tmp_path / "a", tuned, clip_config), "module": whole, "state": tuned}
    message = r"task 'a': .*post_layernorm.weight'?: 2 of 32 values are not finite, the first at \(4,\)"
    with pytest.raises((IncompatibleModel, CheckpointError), match=message):
        mingle.Merger(base, "average").add("a", models[form])


def test_nan_in_the_last_of_four_models_keeps_the_first_three(base, tuned, clip_config, tmp_path, capsys):
    experts = {}
    for i in range(4):
        experts[f"t{i}"] = written(tmp_path / f"t{i}", moved(tuned, i), clip_config)
    sound = (experts["t3"] / "model.safetensors").read_bytes()
    broken = load_file(experts["t3"] / "model.safetensors")
    broken["vision_model.post_layernorm.weight"][0] = float("nan")
    save_file(broken, experts["t3"] / "model.safetensors", {"format": "pt"})
    path = config_file(tmp_path, base, experts)
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "task 't3'" in shown and "1 of 32 values are not finite" in shown
    assert "what was merged is saved; the same command goes on from there" in shown
    assert mingle.Merger.from_pretrained(tmp_path / "out").task_names == ["t0", "t1", "t2"]
    (experts["t3"] / "model.safetensors").write_bytes(sound)
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    straight = mingle.Merger(base, "average")
    for name, folder in experts.items():
        straight.add(name, folder)
    resumed = mingle.Merger.from_pretrained(tmp_path / "out").model.state_dict()
    assert all(torch.equal(t, resumed[name]) for name, t in straight.model.state_dict().items())
