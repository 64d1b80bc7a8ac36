"""Merges as PEFT adapters with a router beside them: PEFT loads them, and mingle goes on from them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapter_merges import GATED, WHOLE, answers, everything, merger_of, peft, with_expert
from small_merges import NAMES, add, same_bits
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import mingle
from mingle.io.files import write_json
from mingle.io.hub import ModelName
from mingle.io.safetensors import write_tensors
from mingle.merging.adapters import files
from mingle.nn.peft import read_adapter
from mingle.tasks import TaskData


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


def test_exported_adapters_merge_as_any_other(base_model, tuned_states, samples, tmp_path):
    merger_of(base_model, "mingle", tuned_states, samples).export(tmp_path / "out", format="peft")
    merger = mingle.Merger(base_model, "average")
    for name in ("one", "two"):
        merger.add(name, tmp_path / "out" / name)
    assert not torch.allclose(answers(merger.model, samples), answers(base_model, samples), atol=1e-3)
