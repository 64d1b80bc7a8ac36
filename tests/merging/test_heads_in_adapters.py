"""Adapters that peft saves with a classifier's head, or without one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from classifiers import NAMES, inputs, made, tuned

import mingle
from mingle.io.state_dicts import IncompatibleModel

peft = pytest.importorskip("peft")


def labels(model):
    return tuple(model.config.id2label[number] for number in range(model.config.num_labels))


def adapter(base, folder, **options):
    """An adapter for three classes as peft saves it, and the model that it makes of the base."""
    config = peft.LoraConfig(r=2, lora_alpha=4, **options)
    whole = tuned(base, NAMES[1])
    whole.base_model.load_state_dict(base.base_model.state_dict())
    model = peft.get_peft_model(whole, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", dict(task_type="SEQ_CLS", target_modules=["query"], bias="all")),
        ("vit", dict(target_modules=["q_proj"], modules_to_save=["classifier"], bias="lora_only")),
        ("bert", dict(task_type="SEQ_CLS", target_modules=["query", "value"])),
        ("roberta", dict(task_type="SEQ_CLS", target_modules=["query", "dense"])),
        ("llama", dict(task_type="SEQ_CLS", target_modules="all-linear")),
        ("vit", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    ],
)
def test_an_adapter_saved_with_its_head_is_the_model_that_peft_makes_of_it(kind, options, tmp_path):
    base = made(kind)
    model = adapter(base, tmp_path, **options)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    merger = mingle.Merger(base, "average")
    merger.add("one", tmp_path, {**inputs(base), "class_names": list(NAMES[1])})
    served = merger.model_for("one")
    assert labels(served) == NAMES[1]
    torch.testing.assert_close(
        served(**inputs(base)).logits, model(**inputs(base)).logits, atol=1e-5, rtol=1e-5
    )


def test_what_an_adapter_saved_beside_the_head_is_merged(tmp_path):
    base = made("bert")
    model = adapter(
        base, tmp_path, target_modules=["query"], modules_to_save=["classifier", "word_embeddings"]
    )
    merger = mingle.Merger(base, "average")
    merger.add("one", tmp_path, {**inputs(base), "class_names": list(NAMES[1])})
    embeddings = model.base_model.model.get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(merger.model_for("one").get_input_embeddings().weight, embeddings)


def test_an_update_of_the_base_s_head_is_the_task_s_own(tmp_path):
    base = made("bert")
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["query", "classifier"])
    ).eval()
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    merger = mingle.Merger(base, "average")
    merger.add("one", tmp_path)
    torch.testing.assert_close(
        merger.model_for("one")(**inputs(base)).logits, model(**inputs(base)).logits, atol=1e-5, rtol=1e-5
    )


def test_an_adapter_without_a_head_has_that_of_the_base_if_it_is_there(tmp_path):
    base = made("bert")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(tmp_path / "adapter")
    merger = mingle.Merger(base, "average")
    merger.add("one", tmp_path / "adapter")
    assert torch.equal(merger.model_for("one").classifier.weight, base.classifier.weight)
    base.bert.save_pretrained(tmp_path / "base")
    headless = mingle.Merger(tmp_path / "base", "average", "text-classification")
    with pytest.raises(IncompatibleModel, match="saved with its head"):
        headless.add("one", tmp_path / "adapter")
