"""Merges as PEFT adapters with a router beside them: PEFT loads them, and mingle goes on from them."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from small_merges import NAMES, SETTINGS, add, same_bits
from transformers import (
    AutoModelForCausalLM,
    CLIPModel,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import mingle
from mingle.io.adapters_folder import folder_names
from mingle.io.files import CheckpointError, write_json
from mingle.io.hub import ModelName
from mingle.io.safetensors import write_tensors
from mingle.merging.adapters import files
from mingle.methods import METHODS
from mingle.nn.matrices import oriented
from mingle.nn.peft import read_adapter
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask

peft = pytest.importorskip("peft")

ROUTED = {"rank": 4, "depths": (0, 1)}
GATED = {
    "mingle": SETTINGS,
    "mingle-light": SETTINGS | {"reduce": "token"},
    "mingle-routed": SETTINGS,
    "mingle-seq": SETTINGS | {"start": "previous"},
    "mass": {"rank": 4},
    "routed": ROUTED,
}
WHOLE = {"README.md", "router.json", "router.safetensors"}


def merger_of(base, method, tuned, samples, count=2, **options):
    merger = mingle.Merger(base, method, **(GATED.get(method, {}) | options))
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def answers(model, samples):
    with torch.no_grad():
        return ClipTask().logits(model, samples[0])


def with_expert(merger, index):
    """The base with one expert added to its weights."""
    model = copy.deepcopy(merger.base)
    tower = model.get_submodule(merger.task.tower(model))
    for name, layer in merger.method.layers.items():
        linear = tower.get_submodule(name)
        linear.weight.data += oriented(layer.B[index] @ layer.A[index], linear)
    return model


def everything(merger):
    kept = {
        f"{i}/{k}": v for i in range(len(merger.merged)) for k, v in merger.method.task_tensors(i).items()
    }
    return kept | merger.method.state_tensors() | merger.model.state_dict()


def loaded(model, folder, **options):
    """PEFT's model, once nothing was missing and nothing left over."""
    adapted = peft.PeftModel.from_pretrained(model, folder, **options)
    report = adapted.load_adapter(folder, adapter_name="again")
    assert not report.unexpected_keys and not [key for key in report.missing_keys if "lora" in key]
    adapted.delete_adapter("again")
    return adapted.eval()


@pytest.mark.parametrize("method", GATED)
def test_peft_loads_each_adapter_and_it_is_the_base_with_that_expert(
    base_model, base_folder, tuned_states, samples, tmp_path, method
):
    merger = merger_of(base_folder, method, tuned_states, samples)
    merger.export(tmp_path / "out", format="peft")
    assert {path.name for path in (tmp_path / "out").iterdir()} == WHOLE | {"one", "two"}
    for index, name in enumerate(NAMES[:2]):
        model = loaded(copy.deepcopy(base_model), tmp_path / "out" / name)
        expected = answers(with_expert(merger, index), samples)
        torch.testing.assert_close(answers(model.base_model.model, samples), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, answers(base_model, samples), atol=1e-3)
        factors = read_adapter(tmp_path / "out" / name)
        layer = merger.method.layers["encoder.layers.0.self_attn.q_proj"]
        found = factors["vision_model.encoder.layers.0.self_attn.q_proj"]
        assert torch.equal(found.A, layer.A[index]) and torch.equal(found.B, layer.B[index])


def test_adapters_are_swapped_while_the_model_runs(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "routed", tuned_states, samples)
    merger.export(tmp_path, format="peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base_model), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        expected = answers(with_expert(merger, NAMES.index(name)), samples)
        torch.testing.assert_close(answers(model.base_model.model, samples), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", GATED)
def test_back_in_mingle_the_merge_goes_on_bit_for_bit(base_folder, tuned_states, samples, tmp_path, method):
    merger = merger_of(base_folder, method, tuned_states, samples)
    merger.evaluate(dict(zip(NAMES, samples, strict=False)))
    merger.export(tmp_path / "out", format="peft")
    again = mingle.Merger.from_adapters(base_folder, tmp_path / "out")
    assert (again.merged, again.matrix, again.options) == (merger.merged, merger.matrix, merger.options)
    same_bits(everything(again), everything(merger))
    assert torch.equal(answers(again.model, samples), answers(merger.model, samples))
    for each in (merger, again):
        add(each, 2, tuned_states, samples)
    same_bits(everything(again), everything(merger))
    assert again.save_pretrained(tmp_path / "saved") is None
    same_bits(everything(mingle.Merger.from_pretrained(tmp_path / "saved")), everything(merger))


def test_a_skipped_task_keeps_its_place_and_has_no_adapter(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "mingle", tuned_states, samples, count=1)
    merger.add("same", base_model, TaskData(samples[1].inputs, samples[1].shared))
    add(merger, 2, tuned_states, samples)
    merger.export(tmp_path / "out", format="peft")
    assert {path.name for path in (tmp_path / "out").iterdir()} == WHOLE | {"one", "three"}
    assert "| same | none: nothing to merge |" in (tmp_path / "out" / "README.md").read_text()
    again = mingle.Merger.from_adapters(base_model, tmp_path / "out")
    assert again.task_names == ["one", "same", "three"] and again.merged[1].skipped
    same_bits(everything(again), everything(merger))


def test_half_precision_comes_back_bit_for_bit(base_model, tuned_states, samples, tmp_path):
    base = copy.deepcopy(base_model).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    halves = [
        TaskData({"pixel_values": each.inputs["pixel_values"].bfloat16()}, each.shared) for each in samples
    ]
    merger = merger_of(base, "routed", tuned_states, halves)
    merger.export(tmp_path / "out", format="peft")
    for given in (base, tmp_path / "base"):
        same_bits(everything(mingle.Merger.from_adapters(given, tmp_path / "out")), everything(merger))


def test_layers_of_lower_rank_have_patterns(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=2, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    base = T5ForConditionalGeneration(config).eval()
    tuned = {
        name: tensor + 0.1 * torch.randn(tensor.shape) if tensor.dim() == 2 else tensor
        for name, tensor in base.state_dict().items()
        if name not in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    }
    ids = torch.randint(2, 40, (6, 5))
    merger = mingle.Merger(base, "routed", rank=8, depths=(0, 1))
    merger.add("a", tuned, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    merger.export(tmp_path / "out", format="peft")
    said = json.loads((tmp_path / "out" / "a" / "adapter_config.json").read_text())
    assert (said["task_type"], said["r"], said["lora_alpha"]) == ("SEQ_2_SEQ_LM", 4, 4)
    assert said["rank_pattern"] == said["alpha_pattern"]
    assert set(said["rank_pattern"].values()) == {8}
    model = loaded(copy.deepcopy(base), tmp_path / "out" / "a")
    assert isinstance(model, peft.PeftModelForSeq2SeqLM)
    with torch.no_grad():
        found, expected = (
            m(input_ids=ids, decoder_input_ids=ids).logits for m in (model, with_expert(merger, 0))
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    same_bits(everything(mingle.Merger.from_adapters(base, tmp_path / "out")), everything(merger))


def test_a_layer_whose_name_is_the_end_of_another_s_is_told_apart(tmp_path):
    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)
            self.inner = torch.nn.Sequential()
            self.inner.add_module("fc", torch.nn.Linear(4, 4))

    base, expert = Twin(), mingle.LowRankExpert(torch.randn(2, 4), torch.randn(4, 2))
    found = files(base, "", ModelName(), {"fc": expert}, {})
    write_json(tmp_path / "adapter_config.json", found.config)
    write_tensors(tmp_path / "adapter_model.safetensors", found.tensors)
    model = loaded(copy.deepcopy(base), tmp_path).base_model.model
    assert type(model.inner.fc) is torch.nn.Linear and type(model.fc) is not torch.nn.Linear


LANGUAGE_MODELS = {
    "llama": LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32),
}
for _config in LANGUAGE_MODELS.values():
    _config.vocab_size, _config.bos_token_id, _config.eos_token_id = 60, 2, 1


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_adapters_and_folded_models_of_language_models(kind, tmp_path):
    """Those of GPT-2 have transposed weights."""
    base = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[kind]).eval()
    tokens = torch.randint(3, 60, (4, 6))
    merger = mingle.Merger(base, "routed", rank=4, depths=(0, 1))
    for i, name in enumerate(NAMES[:2]):
        tuned = copy.deepcopy(base)
        for parameter in tuned.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        merger.add(name, tuned, {"input_ids": tokens.roll(i)})
    merger.export(tmp_path / "out", format="peft")
    merger.export(tmp_path / "two", "two")
    config = json.loads((tmp_path / "out" / "two" / "adapter_config.json").read_text())
    assert (config["task_type"], config["fan_in_fan_out"]) == ("CAUSAL_LM", kind == "gpt2")
    adapted = loaded(copy.deepcopy(base), tmp_path / "out" / "two")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    with torch.no_grad():
        expected = with_expert(merger, 1)(tokens).logits
        for model in (adapted, folded):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(tokens).logits, expected, atol=1e-2)
    assert torch.equal(
        adapted.generate(tokens, max_new_tokens=4, do_sample=False),
        folded.generate(tokens, max_new_tokens=4, do_sample=False),
    )
    same_bits(everything(mingle.Merger.from_adapters(base, tmp_path / "out")), everything(merger))


def test_heads_come_back_with_their_tasks(tmp_path):
    config = ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                       image_size=8, patch_size=4, num_labels=3)  # fmt: skip
    base = ViTForImageClassification(config).eval()
    pixels = torch.randn(6, 3, 8, 8)
    merger = mingle.Merger(base, "routed", rank=4, depths=(0, 1))
    for name in NAMES[:2]:
        tuned = copy.deepcopy(base)
        for parameter in tuned.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        merger.add(name, tuned, {"pixel_values": pixels})
    merger.export(tmp_path / "out", format="peft")
    merger.export(tmp_path / "one", "one")
    again = mingle.Merger.from_adapters(base, tmp_path / "out")
    for name in NAMES[:2]:
        models = [copy.deepcopy(each.model_for(name)) for each in (merger, again)]
        assert models[0].classifier.weight.ne(base.classifier.weight).all()
        with torch.no_grad():
            assert torch.equal(*(model(pixel_values=pixels).logits for model in models))
    folded = ViTForImageClassification.from_pretrained(tmp_path / "one")
    assert torch.equal(folded.classifier.weight, merger.model_for("one").classifier.weight)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / "one").eval()
    with torch.no_grad():
        found, expected = (model(pixel_values=pixels).logits for model in (adapted, folded.eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "num_labels=3" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_of_the_machine_is_in_it(base_folder, tuned_states, samples, tmp_path):
    snapshot = tmp_path / "models--org--small-clip" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(base_folder, snapshot)
    merger = merger_of(snapshot, "routed", tuned_states, samples)
    merger.metadata["suite"] = str(tmp_path / "images")
    merger.save_pretrained(tmp_path / "merged")
    expected = {tmp_path / "a": merger, tmp_path / "b": mingle.Merger.from_pretrained(tmp_path / "merged")}
    for out, each in expected.items():
        each.export(out, format="peft")
        config = json.loads((out / "one" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/small-clip"
        assert config["revision"] == snapshot.name
        assert not [
            file for file in out.rglob("*") if file.is_file() and str(tmp_path).encode() in file.read_bytes()
        ]
        assert "base_model: org/small-clip" in (out / "README.md").read_text()


@pytest.mark.parametrize("place", ["/home/someone/models/clip", "C:\\models\\clip", "./clip", None])
def test_a_module_s_own_name_is_cut_to_what_others_can_use(
    base_model, tuned_states, samples, tmp_path, place
):
    base = copy.deepcopy(base_model)
    base.config._name_or_path = place or ""
    merger_of(base, "routed", tuned_states, samples).export(tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ("clip" if place else None)


def test_the_card_says_how_well_one_adapter_per_input_does(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "routed", tuned_states, samples, gates="hard")
    merger.export(tmp_path / "a", format="peft")
    assert "whose accuracy was not measured" in (tmp_path / "a" / "README.md").read_text()
    acc = merger.evaluate(dict(zip(NAMES, samples, strict=False))).matrix[-1][0]
    merger.export(tmp_path / "b", format="peft")
    card = (tmp_path / "b" / "README.md").read_text()
    assert 'has the accuracies above, under "now"' in card and f"| not measured | {acc:.1f} % |" in card
    soft = merger_of(base_model, "routed", tuned_states, samples)
    soft.export(tmp_path / "c", format="peft")
    assert "the accuracy of that was not measured" in (tmp_path / "c" / "README.md").read_text()


def test_the_card_s_code_runs(base_folder, tuned_states, samples, tmp_path, monkeypatch):
    merger_of(base_folder, "routed", tuned_states, samples).export(tmp_path / "out", format="peft")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    shutil.copytree(base_folder, tmp_path / "out" / "base")  # the base's folder has this name
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code, names)
    assert names["model"].active_adapter == "two"


def test_task_names_become_folders_that_are_safe_and_differ():
    hostile = [
        "../x",
        "a/b",
        "a b",
        "A_B",
        "",
        "日本",
        "v1.5",
        "train",
        "x" * 300,
        "-rf",
        "router.json",
        "\x1b[2J",
    ]
    names = folder_names(hostile)
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert name.replace("-", "").replace("_", "").isalnum() and name.isascii() and name[0] not in "-_"
        torch.nn.ModuleDict()[name] = torch.nn.Identity()  # as PEFT does
    assert names[6] == "v1_5"


def test_hostile_task_names_come_back(base_model, tuned_states, samples, tmp_path):
    names = ["../../x", "a|b`\n# c"]
    merger = mingle.Merger(base_model, "routed", **ROUTED)
    for i, name in enumerate(names):
        merger.add(name, tuned_states[i], TaskData(samples[i].inputs, samples[i].shared))
    merger.export(tmp_path / "place" / "out", format="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert {path.name for path in (tmp_path / "place" / "out").iterdir()} == WHOLE | {"x", "a_b_c"}
    assert mingle.Merger.from_adapters(base_model, tmp_path / "place" / "out").task_names == names


def test_every_method_exports_adapters_or_says_why_not(base_model, tuned_states, samples, tmp_path):
    for method in METHODS:
        merger = mingle.Merger(base_model, method, **(ROUTED if method == "routed" else {}))
        if method in GATED:
            with pytest.raises(ValueError, match="no expert was merged yet"):
                merger.export(tmp_path / "out", format="peft")
            continue
        merger = mingle.Merger(
            base_model, method, **({"steps": 1} if hasattr(merger.options, "steps") else {})
        )
        add(merger, 0, tuned_states, samples)
        reason = "task arithmetic, which is not of low rank" if method == "wemoe" else "no low-rank expert"
        with pytest.raises(ValueError, match=f"method '{method}' .*{reason}"):
            merger.export(tmp_path / "out", format="peft")
    merger = merger_of(base_model, "routed", tuned_states, samples)
    with pytest.raises(ValueError, match="'peft2'; did you mean 'peft'"):
        merger.export(tmp_path / "out", format="peft2")
    with pytest.raises(ValueError, match="adapters are exported for all tasks together"):
        merger.export(tmp_path / "out", "one", "peft")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exported(base_model, tuned_states, samples, tmp_path):
    merger_of(base_model, "mingle", tuned_states, samples).export(tmp_path / "out", format="peft")
    return tmp_path / "out"


def edit(folder, change):
    said = json.loads((folder / "router.json").read_text())
    change(said)
    (folder / "router.json").write_text(json.dumps(said))


def test_what_is_broken_or_belongs_elsewhere_is_refused_by_name(base_model, exported, tmp_path):
    def refused(match, change):
        folder = tmp_path / "broken"
        shutil.copytree(exported, folder)
        change(folder)
        with pytest.raises(CheckpointError, match=match):
            mingle.Merger.from_adapters(base_model, folder)
        shutil.rmtree(folder)

    refused("one/adapter_model.safetensors: missing, although router.json names it",
            lambda f: (f / "one" / "adapter_model.safetensors").unlink())  # fmt: skip
    refused("router.safetensors: its content is not what router.json says",
            lambda f: flip(f / "router.safetensors"))  # fmt: skip
    refused("two/adapter_model.safetensors: expected .* bytes",
            lambda f: (f / "two" / "adapter_model.safetensors").write_bytes(b"x"))  # fmt: skip
    refused("format version 2, this mingle reads 1", lambda f: edit(f, lambda s: s.update(format_version=2)))
    refused("router.json: unknown method", lambda f: edit(f, lambda s: s.update(method="x")))
    refused("router.json: the whole|not the manifest", lambda f: (f / "router.json").write_text("[]"))
    refused("tasks.0..adapter.file: expected a text of the form",
            lambda f: edit(f, lambda s: s["tasks"][0]["adapter"].update(file="../one/x")))  # fmt: skip
    refused("two of them have the same adapter",
            lambda f: edit(f, lambda s: s["tasks"][0].update(adapter=s["tasks"][1]["adapter"])))  # fmt: skip
    refused("the tensors do not fit the method 'mingle'", lambda f: edit(f, two_layers))
    refused("the tensors do not fit the method 'mingle'",
            lambda f: edit(f, lambda s: s["tasks"][0].update(adapter=None)))  # fmt: skip
    refused("tensor 'tasks/1/.*' belongs to nothing", lambda f: edit(f, without_the_last))
    other = copy.deepcopy(base_model)
    other.logit_scale.data += 1
    with pytest.raises(CheckpointError, match="made for another base model"):
        mingle.Merger.from_adapters(other, exported)


def two_layers(said):
    """Another set of layers than that of the tensors."""
    said["options"]["layers"] = ["q_proj", "k_proj"]


def without_the_last(said):
    for key in ("tasks", "matrix", "unknown"):
        said[key].pop()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_adapters_that_are_no_export_are_refused_with_how_to_merge_them(base_model, exported):
    (exported / "router.json").unlink()
    with pytest.raises(CheckpointError, match="holds the LoRA adapters 'one', 'two', .* merger.add"):
        mingle.Merger.from_adapters(base_model, exported)
    with pytest.raises(CheckpointError, match="is a LoRA adapter by itself, .* merger.add"):
        mingle.Merger.from_adapters(base_model, exported / "one")
    (exported / "empty").mkdir()
    with pytest.raises(CheckpointError, match="does not hold adapters"):
        mingle.Merger.from_adapters(base_model, exported / "empty")
    with pytest.raises(CheckpointError, match="nowhere"):
        mingle.Merger.from_adapters(base_model, exported / "nowhere")


def test_exported_adapters_merge_as_any_other(base_model, exported, samples):
    merger = mingle.Merger(base_model, "average")
    for name in ("one", "two"):
        merger.add(name, exported / name)
    assert not torch.allclose(answers(merger.model, samples), answers(base_model, samples), atol=1e-3)


CONSTANT = GATED | {"mingle": SETTINGS, "wemoe": {"steps": 2, "rank": 4, "later_rank": 2}}


@pytest.mark.parametrize("method", CONSTANT)
@pytest.mark.parametrize("given", [False, True], ids=["alone", "means"])
def test_a_folded_model_answers_as_the_merged_one_with_these_gates(
    base_folder, tuned_states, samples, tmp_path, method, given
):
    merger = mingle.Merger(base_folder, method, **CONSTANT[method])
    for i in range(2):
        add(merger, i, tuned_states, samples)
    seeds = TaskData(samples[1].inputs, samples[1].shared)
    merger.export(tmp_path / "two", "two", seed_data=seeds if given else None)
    model, report = CLIPModel.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    gates = merger.method.folded(1, seeds if given else None).gates
    means = given and merger.method.folds_by_means
    assert all(torch.equal(gate, gate.new_tensor([0, 1])) for gate in gates.values()) != means
    held = copy.deepcopy(merger.model)
    for module in held.modules():  # routers would overrule what is given
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    for name, gate in gates.items():
        held.vision_model.get_submodule(name).given_gates = gate
    torch.testing.assert_close(answers(model.eval(), samples), answers(held, samples), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "A model for the task two" in card
    assert ("means over 24 samples" if means else "1 for the task's own expert and 0 for all others") in card


def test_mean_gates_are_those_of_the_formula(base_model, tuned_states, samples, tmp_path):
    """For gates of a sample's mean, the mean over samples is the gate of the mean of all samples' means."""
    merger = merger_of(base_model, "mingle", tuned_states, samples)
    name = "encoder.layers.1.mlp.fc1"
    layer, seen = merger.method.layers[name], []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answers(merger.model, samples)
    handle.remove()
    weight, bias = layer.all_gates()
    expected = weight @ seen[0].mean((0, 1)) + bias
    found = merger.method.folded(0, TaskData(samples[0].inputs, samples[0].shared)).gates[name]
    torch.testing.assert_close(found, expected)


def test_half_precision_is_folded_in_full(base_model, tuned_states, samples, tmp_path):
    base = copy.deepcopy(base_model).to(torch.bfloat16)
    merger = mingle.Merger(base, "routed", **ROUTED)
    halves = TaskData({"pixel_values": samples[0].inputs["pixel_values"].bfloat16()}, samples[0].shared)
    merger.add("one", tuned_states[0], halves)
    merger.export(tmp_path / "out", "one")
    model = CLIPModel.from_pretrained(tmp_path / "out")
    for name, layer in merger.method.layers.items():
        expected = layer.weight.float() + layer.B[0].float() @ layer.A[0].float()
        assert torch.equal(model.vision_model.get_submodule(name).weight, expected.bfloat16())


def test_requests_that_make_no_sense_are_refused(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "mingle", tuned_states, samples)
    seeds = TaskData(samples[0].inputs, samples[0].shared)
    with pytest.raises(ValueError, match="'three' is not among the merged ones"):
        merger.export(tmp_path / "out", "three")
    with pytest.raises(ValueError, match="no task was named"):
        merger.export(tmp_path / "out", seed_data=seeds)
    with pytest.raises(ValueError, match="need 'pixel_values'"):
        merger.export(tmp_path / "out", "one", seed_data={})
    assert not list(tmp_path.iterdir())
