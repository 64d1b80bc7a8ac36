"""Heads of classifiers: kept with their task, put into the merged model, exported, or refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from classifiers import MAKERS, NAMES, inputs, made, tuned
from safetensors.torch import load_file, save_file

import mingle
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel

TASK_TYPES = {"vit": "image-classification"}


def merged(base, method="average", **options):
    """Two tasks, of two and of three classes."""
    merger = mingle.Merger(base, method, **options)
    models = [tuned(merger.base, names, seed) for seed, names in enumerate(NAMES, 1)]
    for number, model in enumerate(models):
        merger.add(f"task {number}", model, inputs(merger.base, seed=number))
    return merger, models


def labels(model):
    return tuple(model.config.id2label[number] for number in range(model.config.num_labels))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_task_is_served_with_its_own_head_and_names(kind, tmp_path):
    base = made(kind)
    merger, models = merged(base)
    head = merger.task.heads(merger.base)
    assert head
    merger.save_pretrained(tmp_path / "merged")
    for found in (merger, mingle.Merger.from_pretrained(tmp_path / "merged")):
        for number, (model, names) in enumerate(zip(models, NAMES, strict=True)):
            served = found.model_for(f"task {number}")
            assert labels(served) == names and served.num_labels == len(names)
            assert served.config.label2id == {name: i for i, name in enumerate(names)}
            for name in head:
                assert torch.equal(served.state_dict()[name], model.state_dict()[name])
            assert served(**inputs(base)).logits.shape == (8, len(names))
    assert torch.equal(merger.base.state_dict()[head[0]], base.state_dict()[head[0]])


@pytest.mark.parametrize("kind", MAKERS)
def test_an_exported_task_answers_as_the_merger_does(kind, tmp_path):
    base = made(kind)
    base.save_pretrained(tmp_path / "base")
    merger, _ = merged(tmp_path / "base") if kind == "vit" else merged(base)
    with pytest.raises(ValueError, match="each task has a head of its own; name one of task 0, task 1"):
        merger.export(tmp_path / "out")
    merger.export(tmp_path / "out", task="task 1")
    model = type(base).from_pretrained(tmp_path / "out").eval()
    assert labels(model) == NAMES[1]
    expected = merger.model_for("task 1")(**inputs(base)).logits
    torch.testing.assert_close(model(**inputs(base)).logits, expected, atol=1e-6, rtol=1e-6)


def test_names_come_from_the_model_its_folder_or_the_samples(tmp_path):
    base = made("bert")
    model = tuned(base, NAMES[1])
    model.save_pretrained(tmp_path / "tuned")
    unnamed = tuned(base, ("LABEL_0", "LABEL_1", "LABEL_2"))
    merger = mingle.Merger(base, "average")
    merger.add("module", model)
    merger.add("folder", tmp_path / "tuned")
    merger.add("state", model.state_dict())
    merger.add("unnamed", unnamed)
    merger.add("samples", model.state_dict(), {**inputs(base), "class_names": ["a", "b", "c"]})
    assert [task.labels for task in merger.merged] == [
        *[list(NAMES[1])] * 2, None, None, ["a", "b", "c"],
    ]  # fmt: skip
    assert labels(merger.model_for("state")) == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(IncompatibleModel, match=r"task 'x': there are names for 2 classes"):
        merger.add("x", model, {**inputs(base), "class_names": ["a", "b"]})
    with pytest.raises(ValueError, match="class_names: 'abc': expected a list of texts"):
        merger.add("x", model, {**inputs(base), "class_names": "abc"})


@pytest.mark.parametrize("kind", MAKERS)
def test_classes_without_names_are_counted_by_the_head(kind, tmp_path):
    base = made(kind)
    merger = mingle.Merger(base, "average")
    for number, names in enumerate(NAMES):
        merger.add(f"task {number}", tuned(base, names, number + 1).state_dict())
    merger.save_pretrained(tmp_path)
    for found in (merger, mingle.Merger.from_pretrained(tmp_path)):
        assert labels(found.model) == ("LABEL_0", "LABEL_1", "LABEL_2")
        assert labels(found.model_for("task 0")) == ("LABEL_0", "LABEL_1")


def test_a_head_that_was_replaced_in_memory_does_not_keep_the_names_of_the_old_one():
    base = made("vit")
    model = tuned(base, NAMES[1])
    model.classifier = torch.nn.Linear(16, 4)
    merger = mingle.Merger(base, "average")
    merger.add("one", model)
    assert merger.merged[0].labels is None
    assert labels(merger.model_for("one")) == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        (dict(problem_type="regression"), NAMES[1], "problem_type is 'regression'; merged are classifiers"),
        (dict(problem_type="multi_label_classification"), NAMES[0], "problem_type is 'multi_label_class"),
        ({}, ("score",), "its head gives a single number, as for regression"),
    ],
)
def test_heads_whose_answer_is_not_one_class_are_refused(settings, names, message, tmp_path):
    base = made("bert")
    model = tuned(base, names, **settings)
    model.save_pretrained(tmp_path)
    merger = mingle.Merger(base, "average")
    for given in (model, tmp_path):
        with pytest.raises(IncompatibleModel, match=f"task 'x': .*{message}"):
            merger.add("x", given)
    assert not merger.merged


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"id2label: \['a', 'b'\]: expected a text for each class"),
        ({"0": "a", "2": "b"}, "expected the classes 0, 1, 2"),
        ({"0": "a", "1": 3}, "expected a text for each class"),
        ({str(i): str(i) for i in range(7)}, "names for 7 classes, and no tensor of the head"),
    ],
)
def test_names_that_cannot_be_those_of_the_head_are_refused(names, message, tmp_path):
    base = made("bert")
    tuned(base, NAMES[1]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": names}))
    with pytest.raises((IncompatibleModel, CheckpointError), match=message):
        mingle.Merger(base, "average").add("x", tmp_path)


def test_a_model_without_a_head_is_refused_with_what_to_give():
    base = made("bert")
    with pytest.raises(
        IncompatibleModel, match=r"no head.*classifier\.weight and 1 more missing; give the wh"
    ):
        mingle.Merger(base, "average").add("x", tuned(base, NAMES[0]).bert)


# Bases without a head


@pytest.mark.parametrize("given", ["module", "folder"])
@pytest.mark.parametrize(
    ("base_class", "kind"),
    [
        (hf.BertModel, "bert"),
        (hf.BertForMaskedLM, "bert"),
        (hf.ViTModel, "vit"),
        (hf.RobertaModel, "roberta"),
        (hf.LlamaModel, "llama"),
    ],
)
def test_a_base_needs_no_head(base_class, kind, given, tmp_path):
    classifier = made(kind)
    base = base_class(classifier.config).eval()
    tower = base.base_model.state_dict() | classifier.base_model.state_dict()
    base.base_model.load_state_dict(tower, strict=False)
    if given == "folder":
        base.save_pretrained(tmp_path / "base")
    task_type = TASK_TYPES.get(kind, "text-classification")
    before, state = base.config.to_dict(), torch.get_rng_state()
    merger = mingle.Merger(tmp_path / "base" if given == "folder" else base, "average", task_type)
    assert base.config.to_dict() == before and torch.equal(torch.get_rng_state(), state)
    models = [tuned(classifier, names, seed) for seed, names in enumerate(NAMES, 1)]
    for number, model in enumerate(models):
        merger.add(f"task {number}", model, inputs(classifier))
    merger.save_pretrained(tmp_path / "merged")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    whole = mingle.Merger(classifier, "average")
    for number, model in enumerate(models):
        whole.add(f"task {number}", model)
    for found in (merger, again):
        for number in range(2):
            expected = whole.model_for(f"task {number}")(**inputs(classifier)).logits
            served = found.model_for(f"task {number}")
            if base_class is not hf.BertForMaskedLM:  # its pooler is not merged, but each task's own
                torch.testing.assert_close(served(**inputs(classifier)).logits, expected)
            assert labels(served) == NAMES[number]


def test_a_pooler_that_the_base_lacks_belongs_to_each_task(tmp_path):
    classifier = made("bert")
    masked = hf.BertForMaskedLM(classifier.config).eval()
    masked.bert.load_state_dict(classifier.bert.state_dict(), strict=False)
    masked.save_pretrained(tmp_path / "base")
    merger = mingle.Merger(tmp_path / "base", "average", "text-classification")
    models = [tuned(classifier, names, seed) for seed, names in enumerate(NAMES, 1)]
    for number, model in enumerate(models):
        merger.add(f"task {number}", model, inputs(classifier))
    merger.save_pretrained(tmp_path / "merged")
    merger.export(tmp_path / "out", task="task 0")
    exported = hf.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    again = mingle.Merger.from_pretrained(tmp_path / "merged")
    name = "bert.pooler.dense.weight"
    for served in (merger.model_for("task 0"), again.model_for("task 0"), exported):
        assert torch.equal(served.state_dict()[name], models[0].state_dict()[name])
    assert not hasattr(exported.config, "absent")
    prediction = merger.predict(inputs(classifier))
    assert prediction == again.predict(inputs(classifier)) and len(prediction) == 8


def test_a_base_of_another_kind_is_refused_in_words():
    with pytest.raises(ValueError, match="transformers has no 'vit' with a text-classification head"):
        mingle.Merger(hf.ViTModel(made("vit").config), "average", "text-classification")


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    base = made("bert")
    tuned(base, NAMES[0]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["classifier.bias"][1] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((IncompatibleModel, CheckpointError), match=r"classifier\.bias.*not finite"):
        mingle.Merger(base, "average").add("x", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=["a"]), "names for 1 classes"),
        (dict(labels="ab"), r"tasks\[0\]\.labels: expected a list"),
        (dict(temperature=0.0), r"tasks\[0\]\.temperature: expected a positive number"),
        (dict(temperature="1"), r"tasks\[0\]\.temperature: expected a number"),
        (dict(tensors=None), r"task 'task 0': expected a head of .*classifier\.weight"),
    ],
)
def test_a_folder_whose_tasks_have_other_heads_is_refused(change, message, tmp_path):
    merger, _ = merged(made("bert"))
    merger.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["tasks"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        mingle.Merger.from_pretrained(tmp_path)


def test_the_second_matrix_has_the_form_of_the_first(tmp_path):
    merger, _ = merged(made("bert"))
    merger.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"unknown": [[None]]}))
    with pytest.raises(CheckpointError, match="unknown: expected a row per task"):
        mingle.Merger.from_pretrained(tmp_path)


def test_a_distilled_deit_keeps_both_of_its_heads(tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config = hf.DeiTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
    base, model = (hf.DeiTForImageClassificationWithTeacher(config).eval() for _ in range(2))
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    pixels = torch.randn(2, 3, 16, 16)
    for place in (base, tmp_path / "base"):
        merger = mingle.Merger(place, "task-arithmetic", scaling=1.0)
        merger.add("one", tmp_path / "tuned")
        assert len(merger.task.heads(merger.base)) == 4
        torch.testing.assert_close(merger.model_for("one")(pixels).logits, model(pixels).logits)
