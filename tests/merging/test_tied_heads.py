"""Fine-tuned models with one tensor for embeddings and head, and with two."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from fine_tuned_folders import config_file, moved, refused, written
from safetensors.torch import load_file
from transformers import T5Config, T5ForConditionalGeneration

import mingle
from mingle.cli import main
from mingle.io.state_dicts import IncompatibleModel
from mingle.runs.check import check
from mingle.runs.config import load


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
