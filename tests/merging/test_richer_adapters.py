"""Adapters that are more than low-rank updates of linear layers: each is the model that peft makes of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import mingle
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.finetuned import FineTuned
from mingle.merging.streamed import StreamedMerger
from mingle.tasks import get

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WEIGHTS, EMBEDDING = "adapter_model.safetensors", "model.embed_tokens.weight"


def llama(tied=False):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=32, tie_word_embeddings=tied, attention_bias=True, **sizes)
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    tokens = dict(vocab_size=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, **tokens)).eval()


def adapted(base, folder, **options):
    """peft's model, all of whose trainable parameters have moved; its adapter is saved in `folder`."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=3, **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in dict.fromkeys(p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


KINDS = {
    "dora": (llama, dict(target_modules=["q_proj", "down_proj"], use_dora=True)),
    "dora-conv1d": (gpt2, dict(target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)),
    "embedding-and-head": (llama, dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embedding-alone": (llama, dict(target_modules=["embed_tokens"])),
    "dora-everywhere": (llama, dict(target_modules=["v_proj", "embed_tokens", "lm_head"], use_dora=True)),
    "modules": (llama, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "tied-modules": (
        lambda: llama(tied=True),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "biases": (llama, dict(target_modules=["q_proj"], bias="all")),
    "own-biases": (llama, dict(target_modules=["q_proj"], bias="lora_only")),
    "biases-conv1d": (gpt2, dict(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "all": (
        llama,
        dict(
            target_modules=["q_proj", "lm_head"],
            use_dora=True,
            use_rslora=True,
            rank_pattern={"lm_head": 3},
            modules_to_save=["embed_tokens", "input_layernorm"],
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_model_that_peft_makes_of_it(kind, tmp_path):
    make, options = KINDS[kind]
    base = make()
    expected = adapted(base, tmp_path, **options).merge_and_unload().state_dict()
    found = FineTuned(tmp_path, base, get("causal-lm")).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    changed = [name for name, tensor in base.state_dict().items() if not torch.equal(found[name], tensor)]
    assert len(changed) > (kind == "dora")


@pytest.mark.parametrize("kind", ["all", "embedding-and-head", "modules"])
def test_they_are_merged_in_memory_and_from_files_alike(kind, tmp_path):
    make, options = KINDS[kind]
    base, adapter, folder = make(), tmp_path / "adapter", tmp_path / "merged"
    base.save_pretrained(tmp_path / "base")
    expected = adapted(base, adapter, **options)
    whole = mingle.Merger(tmp_path / "base", "task-arithmetic", scaling=1.0)
    whole.add("one", adapter)
    tokens = torch.arange(8).view(2, 4)
    torch.testing.assert_close(whole.model(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    streamed = StreamedMerger(tmp_path / "base", "task-arithmetic", scaling=1.0)
    streamed.add("one", adapter, folder)
    again = mingle.Merger.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_experts_are_made_of_what_the_adapter_changes_in_their_layers(tmp_path):
    base = llama()
    options = dict(modules_to_save=["embed_tokens"], use_dora=True)
    merged = adapted(base, tmp_path, target_modules=["q_proj", "lm_head"], **options).merge_and_unload()
    merger = mingle.Merger(copy.deepcopy(base), "routed", rank=16)
    report = merger.add("one", tmp_path, {"input_ids": torch.arange(8).view(2, 4)})
    [left] = [line for line in merger.merged[0].notes if "left as in the base" in line]
    assert "lm_head.weight" in left and EMBEDDING in left and "q_proj" not in left
    for name, expert in merger.method.adapter(0).items():
        before, after = (model.get_parameter(f"{name}.weight") for model in (base, merged))
        torch.testing.assert_close(expert.delta(), after - before, rtol=0, atol=1e-5)
    assert report.skipped is None


def edited(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


HEAD, Q = "base_model.model.lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda t: t.pop(f"{Q}.lora_magnitude_vector"),
            CheckpointError,
            r"layer 'model.layers.0.self_attn.q_proj' has .* and no lora_magnitude_vector",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}),
            CheckpointError,
            r"q_proj.lora_magnitude_vector' is \[3\], expected \[16\]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(2, 16)}),
            CheckpointError,
            "q_proj.lora_embedding_A' has no place by .*adapter_config.json",
        ),
        (
            lambda t: t.update({HEAD: torch.ones(32, 8)}),
            IncompatibleModel,
            r"the adapter's tensor 'lm_head.weight' is \[32, 8\], torch.float32; in the base \[32, 16\]",
        ),
        (
            lambda t: t.update({HEAD: torch.ones(32, 16, dtype=torch.int32)}),
            IncompatibleModel,
            r"'lm_head.weight' is \[32, 16\], torch.int32; in the base",
        ),
        (
            lambda t: t.update({HEAD.replace("head", "haed"): t.pop(HEAD)}),
            IncompatibleModel,
            "tensor 'lm_haed.weight' is not in the base; did you mean 'lm_head.weight'",
        ),
        (
            lambda t: t.update({HEAD.replace("weight", "base_layer.weight"): t[HEAD].clone()}),
            CheckpointError,
            "'base_model.model.lm_head.weight' are both 'lm_head.weight'",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "lora_" in name],
            CheckpointError,
            "no tensors of an update",
        ),
    ],
    ids=["lost", "shape", "stray", "width", "integers", "name", "twice", "none"],
)
def test_what_does_not_fit_is_named(edit, error, message, tmp_path):
    base = llama()
    adapted(base, tmp_path, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    edited(tmp_path, edit)
    with pytest.raises(error, match=message):
        FineTuned(tmp_path, base, get("causal-lm"))


def test_of_new_tokens_what_the_base_has_too_is_merged_when_asked(tmp_path):
    base = llama()
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(35)
    model = adapted(grown, tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    expected = model.merge_and_unload().state_dict()
    with pytest.raises(IncompatibleModel, match="vocabulary has more than the base's: rows 32 to 34"):
        FineTuned(tmp_path, base, get("causal-lm"))
    for name, tensor in FineTuned(tmp_path, base, get("causal-lm"), "base").tensors().items():
        torch.testing.assert_close(tensor, expected[name][: len(tensor)], msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_updates_over_new_tokens_are_merged_for_those_that_the_base_has(dora, tmp_path):
    base = llama()
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(35)
    model = adapted(grown, tmp_path, target_modules=["q_proj", "embed_tokens", "lm_head"], use_dora=dora)
    expected = model.merge_and_unload().state_dict()
    with pytest.raises(IncompatibleModel, match="vocabulary has more than the base's: rows 32 to 34"):
        FineTuned(tmp_path, base, get("causal-lm"))
    for name, tensor in FineTuned(tmp_path, base, get("causal-lm"), "base").tensors().items():
        assert tensor.shape == base.state_dict()[name].shape
        torch.testing.assert_close(tensor, expected[name][: len(tensor)], msg=name)


def test_updates_outside_of_the_tower_are_left_out_and_named(base_model, samples, tmp_path):
    """PEFT's usual targets are in both towers of a CLIP."""
    adapted(base_model, tmp_path, target_modules=["q_proj", "visual_projection"])
    merger = mingle.Merger(base_model, "average")
    [left] = merger.add("one", tmp_path).notes
    assert "text_model" in left and "visual_projection" in left and "vision_model" not in left
    before, after = (model.state_dict() for model in (base_model, merger.model))
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed and all("vision_model" in name and "q_proj" in name for name in changed)


def test_an_adapter_of_a_model_without_its_head_fits_the_one_with_it(tmp_path):
    base = llama()
    options = dict(target_modules=["q_proj"], modules_to_save=["norm"])
    expected = adapted(base.model, tmp_path, **options).merge_and_unload().state_dict()
    found = FineTuned(tmp_path, base, get("causal-lm")).tensors()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], tensor, msg=name)
    assert torch.equal(found["lm_head.weight"], base.lm_head.weight)


def test_an_update_of_the_wrong_kind_of_layer_is_refused(tmp_path):
    base = llama()
    adapted(base, tmp_path, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.lora_"
    edited(
        tmp_path,
        lambda t: t.update({f"{key}{half}.weight": t.pop(f"{key}embedding_{half}") for half in "AB"}),
    )
    with pytest.raises(IncompatibleModel, match="'model.embed_tokens' is an embedding in the base"):
        FineTuned(tmp_path, base, get("causal-lm"))


def test_a_row_without_a_direction_is_refused(tmp_path):
    base = llama()
    adapted(base, tmp_path, target_modules=["q_proj"], use_dora=True)
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    edited(tmp_path, lambda t: t[f"{Q}.lora_B.weight"].zero_())
    with pytest.raises(IncompatibleModel, match=r"q_proj.weight: 16 of 256 values .* first at \(3, 0\)"):
        FineTuned(tmp_path, base, get("causal-lm")).tensors()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(target_modules=["embed_tokens"]), f"'{EMBEDDING}' is one tensor with 'lm_head.weight'"),
        (
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            f"'{EMBEDDING}' is one tensor with 'lm_head.weight'",
        ),
        (
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
            f"'{EMBEDDING}' and 'lm_head.weight' are one tensor in the base and differ in this model",
        ),
    ],
    ids=["update", "one", "both"],
)
def test_what_would_untie_head_and_embeddings_is_refused(options, message, tmp_path):
    base = llama(tied=True)
    adapted(base, tmp_path, **options)
    with pytest.raises(IncompatibleModel, match=message):
        FineTuned(tmp_path, base, get("causal-lm"))


def test_experts_alone_are_read_of_no_such_adapter(tmp_path):
    adapted(llama(), tmp_path, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora is set"):
        mingle.read_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": False}))
    with pytest.raises(CheckpointError, match="lora_magnitude_vector' is not a factor of a linear layer"):
        mingle.read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector' has no place by"):
        FineTuned(tmp_path, llama(), get("causal-lm"))
