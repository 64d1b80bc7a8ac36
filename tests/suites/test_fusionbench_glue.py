"""The GLUE suites of the papers on a stand-in of the hub: prompts, answers, seeds, and a whole merge."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

import standin_hub as standin
from standin_hub import table
from transformers import (
    AutoTokenizer,
    T5ForConditionalGeneration,
)

import mingle
from mingle import suites
from mingle.io.safetensors import CheckpointReader
from mingle.suites.fusionbench.layout import DatasetError
from mingle.tasks.lazy import LazyInputs


@pytest.mark.parametrize(
    ("task", "texts", "answers", "metric"),
    [
        (
            "cola",
            ['Correct: "Bark dogs the."?', 'Correct: "Dogs bark."?'],
            ["unacceptable", "acceptable"],
            "accuracy",
        ),
        ("mnli", ["B b implies D?", "A implies C?"], ["entailment", "contradiction"], "accuracy"),
        ("stsb", ["b and d?", "a and c?"], ["0.0", "5.0"], "spearman"),
    ],
)
def test_glue_samples_are_prompts_and_answers(glue_hub, task, texts, answers, metric):
    data = suites.load("glue-8", protocol="official")[task].select(torch.tensor([1, 0])).made()
    tokenizer = AutoTokenizer.from_pretrained(glue_hub.snapshot("google/flan-t5-base"))
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert data.metric == metric
    assert torch.equal(data.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(data.inputs["attention_mask"], expected["attention_mask"])
    assert data.labels.dtype == torch.int64
    assert data.decode(data.labels) == answers
    ended = [row[row != tokenizer.pad_token_id].tolist() for row in data.labels]
    assert all(row[-1] == tokenizer.eos_token_id for row in ended)


def test_glue_prompts_are_padded_per_batch(glue_hub):
    data = suites.load("glue-8", protocol="official")["qqp"]
    assert isinstance(data.inputs, LazyInputs)
    assert [batch.inputs["input_ids"].shape[1] for batch in data.batches(130)] == [
        len("Is 100? or Or??") + 1
    ] * 2
    assert data.select(slice(0, 10)).made().inputs["input_ids"].shape[1] == len("Is 1? or Or??") + 1


def test_a_hundred_seeds_of_every_glue_task(glue_hub):
    for protocol, left in (("strict", 160), ("official", 260)):
        suite = suites.load("glue-8", protocol=protocol)
        assert (suite.task_type, len(suite.seeds("qqp")), len(suite["qqp"])) == ("seq2seq", 100, left)
        assert suite.seeds("qqp").labels is None
    assert [len(part) for part in (suites.load("glue-8").seeds("cola"), suites.load("glue-8")["cola"])] == [
        1,
        2,
    ]


def test_glue_labels_and_texts_are_checked(glue_hub):
    def add(**changes):
        glue_hub.add(
            "glue",
            {"cola/validation-00000-of-00001.parquet": table(standin.GLUE["cola"] | changes)},
            "dataset",
        )

    add(label=[1, -1, 0])
    with pytest.raises(
        DatasetError, match=r"glue .cola., split 'validation': row 1 has label -1, expected one of 0, 1"
    ):
        suites.load("glue-8").check("cola")
    add(sentence=["a", None, "b"])
    with pytest.raises(DatasetError, match="row 1 has no text in the column 'sentence'"):
        suites.load("glue-8", protocol="official")["cola"].made()


@pytest.mark.parametrize("suite", ["glue-8", "glue-8-lora"])
def test_glue_is_merged_and_evaluated(glue_hub, tmp_path, suite):
    """With whole fine-tuned models, and with adapters."""
    peft = (
        pytest.importorskip("peft", reason="adapters are made with PEFT") if suite == "glue-8-lora" else None
    )
    for task in ("cola", "stsb"):
        model = T5ForConditionalGeneration.from_pretrained(glue_hub.snapshot("google/flan-t5-base"))
        if peft is not None:
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
            )
        model.save_pretrained(tmp_path / task)
        name = f"tanganke/flan-t5-base_glue-{task}{'' if peft is None else '_lora-16'}"
        glue_hub.add(name, standin.contents(tmp_path / task))
    loaded = suites.load(suite)
    merger = mingle.Merger(loaded.base, "mingle", loaded.task_type, rank=2, steps=2)
    for task in ("cola", "stsb"):
        merger.add(task, loaded.expert(task), loaded.seeds(task))
    result = merger.evaluate(loaded)
    assert result.tasks == ["cola", "stsb"] and all(-100 <= value <= 100 for value in result.matrix[-1])


def test_adapters_of_the_lora_suite_are_folders_as_they_are(hub, tmp_path):
    peft = pytest.importorskip("peft", reason="adapters are made with PEFT")
    hub.add("google/flan-t5-base", standin.t5_base(tmp_path / "t5"))
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    peft.get_peft_model(
        model, peft.LoraConfig(r=16, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    ).save_pretrained(tmp_path / "lora")
    hub.add("tanganke/flan-t5-base_glue-cola_lora-16", standin.contents(tmp_path / "lora"))
    folder = suites.load("glue-8-lora").expert("cola")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    assert all("lora_" in name for name in CheckpointReader(folder))
