"""Fine-tuned models as users have them: what is merged, what is refused, and what is said of the rest."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from merge_files import merge_file
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, T5Config, T5ForConditionalGeneration

import mingle
from mingle.cli import main
from mingle.io.files import CheckpointError
from mingle.io.safetensors import CheckpointReader
from mingle.io.state_dicts import IncompatibleModel
from mingle.runs.check import check
from mingle.runs.config import load

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


def written(folder, tensors, config):
    """A folder in hub format from tensors and a configuration."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_file(folder, base, experts, method="average"):
    return merge_file(folder, base, experts, method)


def refused(base, expert, message, tmp_path):
    """Refused by `check`, `merge` and `Merger.add` alike, with nothing written."""
    config = config_file(tmp_path, base, {"a": expert})
    for out in (None, tmp_path / "out"):
        with pytest.raises((IncompatibleModel, CheckpointError), match=message):
            check(load(config), out)
    assert not (tmp_path / "out").exists()
    with pytest.raises((IncompatibleModel, CheckpointError), match=message):
        mingle.Merger(base, "average").add("a", expert)


@pytest.fixture
def base(base_folder):
    return base_folder


@pytest.fixture
def tuned(base_model):
    """The whole base model with another vision tower, as a state dict."""
    generator = torch.Generator().manual_seed(11)
    state = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    return {
        name: t + 0.02 * torch.randn(t.shape, generator=generator) if name.startswith("vision_model.") else t
        for name, t in state.items()
    }


@pytest.fixture
def clip_config(base):
    return json.loads((base / "config.json").read_text())


# Ties


@pytest.fixture
def t5(tmp_path):
    """The tensors and the configuration of a T5 whose file has one tensor for embeddings and head."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tensors = load_file(tmp_path / "t5" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    return tensors, json.loads((tmp_path / "t5" / "config.json").read_text())


def moved(tensors, seed=1, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {name: t + scale * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def test_a_tied_base_refuses_a_model_whose_head_is_its_own(t5, tmp_path):
    tensors, config = t5
    tuned = moved(tensors)
    base = written(tmp_path / "base", tensors, config)
    own_head = written(tmp_path / "own", tuned | {"lm_head.weight": tuned["shared.weight"] + 0.5}, config)
    refused(base, own_head, "'lm_head.weight' and 'shared.weight' are one tensor in the base", tmp_path)
    equal = written(tmp_path / "equal", tuned | {"lm_head.weight": tuned["shared.weight"].clone()}, config)
    check(load(config_file(tmp_path, base, {"a": equal})))
    merger = mingle.Merger(base, "average")
    merger.add("a", equal)
    assert torch.equal(merger.model.lm_head.weight, tuned["shared.weight"])


@pytest.mark.parametrize("says_tied", [True, False])
def test_an_untied_base_keeps_both_tensors_whatever_its_configuration_says(t5, says_tied, tmp_path):
    tensors, config = t5
    config = config | {"tie_word_embeddings": says_tied}
    tuned = moved(tensors)
    head = tensors["shared.weight"] + 0.25
    base = written(tmp_path / "base", tensors | {"lm_head.weight": head}, config)
    good = written(tmp_path / "good", tuned | {"lm_head.weight": head + 0.125}, config)
    path = config_file(tmp_path, base, {"a": good})
    check(load(path))
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "plain")]) == 0
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "plain")
    assert torch.equal(model.lm_head.weight, head + 0.125)
    assert torch.equal(model.shared.weight, tuned["shared.weight"])
    again = T5ForConditionalGeneration.from_pretrained(good)
    assert model.config.scale_decoder_outputs == again.config.scale_decoder_outputs
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = [m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, again)]
    assert torch.equal(*logits)


def test_an_untied_base_refuses_a_tied_model_before_any_merging(t5, tmp_path):
    tensors, config = t5
    base = written(tmp_path / "base", tensors | {"lm_head.weight": tensors["shared.weight"] + 0.25}, config)
    tied = written(tmp_path / "tied", moved(tensors), config)
    refused(base, tied, "1 missing: lm_head.weight", tmp_path)


def test_a_tied_module_refuses_an_untied_one(t5):
    _, config = t5
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config.from_dict(config))
    tuned = copy.deepcopy(base)
    tuned.lm_head.weight = torch.nn.Parameter(tuned.shared.weight.detach() + 1)
    with pytest.raises(IncompatibleModel, match="'lm_head.weight' and 'shared.weight' are one tensor"):
        mingle.Merger(base, "average").add("a", tuned)


def test_an_adapter_of_a_tied_head_is_refused(t5, tmp_path):
    peft = pytest.importorskip("peft")
    tensors, config = t5
    base = written(tmp_path / "base", tensors, config)
    model = T5ForConditionalGeneration.from_pretrained(base)
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    refused(base, tmp_path / "lora", "layer 'lm_head' is one tensor with 'shared.weight'", tmp_path)
    untied = tensors | {"lm_head.weight": tensors["shared.weight"] + 0.25}
    base = written(tmp_path / "untied", untied, config)
    merger = mingle.Merger(base, "average")
    merger.add("a", tmp_path / "lora")
    assert torch.equal(merger.model.shared.weight, tensors["shared.weight"])
    assert not torch.equal(merger.model.lm_head.weight, untied["lm_head.weight"])


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


# Dtypes


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_weights_are_widened(dtype, base, tuned, clip_config, tmp_path):
    narrow = {name: tensor.to(dtype) for name, tensor in tuned.items()}
    expert = written(tmp_path / "a", narrow, clip_config)
    path = config_file(tmp_path, base, {"a": expert}, "individual")
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    got = mingle.Merger.from_pretrained(tmp_path / "out").model.vision_model.state_dict()
    for name, tensor in got.items():
        assert torch.equal(tensor, narrow[f"vision_model.{name}"].float())
    merger = mingle.Merger(base, "individual")
    merger.add("a", narrow)
    assert torch.equal(merger.model.vision_model.state_dict()[name], tensor)


def test_a_float8_base_is_widened(base_model, clip_config, tuned, tmp_path):
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in base_model.state_dict().items()}
    base = written(tmp_path / "base", narrow, clip_config)
    merger = mingle.Merger(base, "task-arithmetic", scaling=1.0)
    for name, tensor in merger.base.state_dict().items():
        assert torch.equal(tensor, narrow[name].float())
    merger.add("a", tuned)
    got = merger.model.vision_model.state_dict()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, tuned[f"vision_model.{name}"])


def test_float64_weights_are_rounded_to_float32(base, tuned, clip_config, tmp_path):
    expert = written(tmp_path / "a", {name: t.double() for name, t in tuned.items()}, clip_config)
    merger = mingle.Merger(base, "individual")
    merger.add("a", expert)
    got = merger.model.vision_model.state_dict()
    assert all(torch.equal(tensor, tuned[f"vision_model.{name}"]) for name, tensor in got.items())


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64], ids=str
)
def test_integers_and_other_codes_are_refused(dtype, base, tuned, clip_config, tmp_path):
    codes = {
        name: (100 * t).round().to(dtype) if name.endswith("fc1.weight") else t for name, t in tuned.items()
    }
    expert = written(tmp_path / "a", codes, clip_config)
    refused(base, expert, rf"fc1.weight holds {dtype}, and so do 1 others; .*dequantise", tmp_path)
    state = mingle.Merger(base, "average")
    with pytest.raises(IncompatibleModel, match="dequantise"):
        state.add("a", codes)


def test_a_base_of_integers_is_refused(base_model, tuned, clip_config, tmp_path):
    codes = {name: (100 * t).round().to(torch.int8) for name, t in base_model.state_dict().items()}
    base = written(tmp_path / "base", codes, clip_config)
    expert = written(tmp_path / "a", tuned, clip_config)
    refused_with = r"holds torch.int8; .*dequantise"
    with pytest.raises(CheckpointError, match=refused_with):
        check(load(config_file(tmp_path, base, {"a": expert})))
    with pytest.raises(CheckpointError, match=refused_with):
        mingle.Merger(base, "average")


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"])
def test_packed_codes_and_scales_are_refused_by_name(code, tmp_path):
    header = json.dumps({"w": {"dtype": code, "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=f"tensor 'w': {code} holds .* quantised .*dequantise"):
        CheckpointReader(path)


def test_a_quantised_model_is_refused_by_its_configuration(base, tuned, clip_config, tmp_path):
    quantised = clip_config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    expert = written(tmp_path / "a", tuned, quantised)
    refused(
        base, expert, "config.json: quantization_config is set, by 'bitsandbytes'; .*dequantise", tmp_path
    )
    whole = written(tmp_path / "base", load_file(base / "model.safetensors"), quantised)
    with pytest.raises(CheckpointError, match="quantization_config"):
        mingle.Merger(whole, "average")


def test_packed_weights_with_scales_are_called_quantised(base, tuned, clip_config, tmp_path):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    packed = tuned | {name: torch.zeros(1024, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(32)}
    expert = written(tmp_path / "a", packed, clip_config)
    refused(base, expert, "absmax.*dequantise", tmp_path)


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
