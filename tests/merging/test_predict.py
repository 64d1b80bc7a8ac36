"""`Merger.predict` and the accuracy where nobody says which task a sample is of."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from classifiers import MAKERS, NAMES, inputs, made, tuned
from small_merges import merge

import mingle
from mingle.merging.calibration import probabilities, temperature
from mingle.tasks import TaskData, TaskType

METHODS = {
    "average": {},
    "mingle": dict(rank=2, steps=2, lr=1e-2, batch_size=4, k=1),
    "routed": dict(rank=2, depths=(0, 1)),
}


def classifiers(kind, method, seeds=True):
    base = made(kind)
    merger = mingle.Merger(base, method, **METHODS[method])
    for number, names in enumerate(NAMES):
        samples = inputs(base, seed=number) if seeds else None
        merger.add(f"task {number}", tuned(base, names, number + 1), samples)
    return merger


@torch.no_grad()
def by_hand(merger, data):
    """Every task's probabilities, each from a pass of its own through the model that serves it."""
    scores = [
        merger.task.logits(merger.model_for(name), merger.task.data(data)) for name in merger.task_names
    ]
    return probabilities(scores, [task.temperature for task in merger.merged], one_scale=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MAKERS)
def test_the_answer_is_the_likeliest_over_all_heads_or_the_routers(kind, method):
    merger = classifiers(kind, method)
    data = inputs(merger.base, seed=7)
    found = merger.predict(data, batch_size=3)
    shares = by_hand(merger, data)
    for row, (task, label, score) in enumerate(zip(found.task, found.label, found.score, strict=True)):
        best = [part[row].max().item() for part in shares]
        place = merger.task_names.index(task)
        assert score == pytest.approx(best[place], abs=1e-5)
        assert label == NAMES[place][int(shares[place][row].argmax())]
        if method != "routed":
            assert score == pytest.approx(max(best), abs=1e-5)
    if method == "routed":
        routed = merger.method.route(merger.task.data(data))
        assert found.task == [merger.task_names[place] for place in routed]


@torch.no_grad()
def test_a_router_knows_its_own_samples_and_sends_strange_ones_to_the_likeliest_head():
    base = made("vit")
    merger = mingle.Merger(base, "routed", rank=2, depths=(0, 1))
    bright = {
        number: {"pixel_values": inputs(base, 16, number)["pixel_values"] + 3 * number} for number in (0, 1)
    }
    for number, names in enumerate(NAMES):
        merger.add(f"task {number}", tuned(base, names, number + 1), bright[number])
    for number in (0, 1):
        assert merger.predict(bright[number]).task == [f"task {number}"] * 16
    strange = {"pixel_values": bright[1]["pixel_values"] + 40}
    found = merger.predict(strange)
    assert found.task == ["task 1"] * 16
    plain = copy.deepcopy(base)
    plain.classifier = tuned(base, NAMES[1], 2).classifier
    expected = [NAMES[1][i] for i in plain(**strange).logits.argmax(1)]
    assert found.label == expected  # the base's weights


def test_predicting_leaves_the_model_with_the_head_that_it_had():
    merger = classifiers("bert", "average")
    before = {name: tensor.clone() for name, tensor in merger.model_for("task 0").state_dict().items()}
    merger.predict(inputs(merger.base))
    after = merger.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_transformer_runs_once_for_all_heads():
    merger = classifiers("bert", "average")
    calls = []
    merger.model.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    merger.predict(inputs(merger.base), batch_size=8)
    assert len(calls) == 1
    labelled = {**inputs(merger.base), "labels": torch.zeros(8, dtype=torch.long)}
    merger.evaluate(dict.fromkeys(merger.task_names, labelled))
    assert len(calls) == 3


@pytest.mark.parametrize("method", METHODS)
def test_class_embeddings_of_all_tasks_share_one_sum(base_model, tuned_states, samples, method, tmp_path):
    merger = mingle.Merger(base_model, method, **METHODS[method])
    for number, state in enumerate(tuned_states):
        merger.add(f"task {number}", state, samples[number])
    merger.save_pretrained(tmp_path)
    again = mingle.Merger.from_pretrained(tmp_path)
    pixels = {"pixel_values": samples[0].inputs["pixel_values"]}
    found = merger.predict(pixels)
    assert found == again.predict(TaskData(pixels))
    with torch.no_grad():
        scores = [merger.task.logits(merger.model, TaskData(pixels, part.shared)) for part in samples]
    temperatures = [task.temperature for task in merger.merged]
    shares = torch.stack(probabilities(scores, temperatures, one_scale=method != "routed"), 1)  # [n, T, C]
    for row in range(24):
        place = merger.task_names.index(found.task[row])
        if method != "routed":
            assert place * 5 + found.label[row] == shares[row].flatten().argmax()
            assert shares[row].sum() == pytest.approx(1)
        assert found.label[row] == shares[row, place].argmax()
        assert found.score[row] == pytest.approx(shares[row, place].max().item(), abs=1e-5)


def test_siglip_compares_the_classes_of_all_tasks_with_its_own_scale_and_bias():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text, vision = dict(vocab_size=20, max_position_embeddings=8), dict(image_size=8, patch_size=4)
    base = hf.SiglipModel(hf.SiglipConfig(text_config=sizes | text, vision_config=sizes | vision)).eval()
    merger, parts = mingle.Merger(base, "average"), []
    for number, count in enumerate((2, 5)):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.vision_model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
        parts.append(
            {
                "pixel_values": torch.randn(6, 3, 8, 8),
                "text_embeds": F.normalize(torch.randn(count, 16), dim=-1),
            }
        )
        merger.add(f"task {number}", model, parts[-1])
    found = merger.predict({"pixel_values": parts[0]["pixel_values"]})
    with torch.no_grad():
        scores = [
            merger.task.logits(merger.model, TaskData({"pixel_values": parts[0]["pixel_values"]}, part))
            for part in parts
        ]
    joined = torch.cat(scores, 1).argmax(1)
    assert [int(task[-1]) * 2 + label for task, label in zip(found.task, found.label, strict=True)] == (
        joined.tolist()
    )


def test_sentence_encoders_answer_with_the_names_of_all_tasks(tmp_path):
    classifier = made("bert")
    merger = mingle.Merger(classifier.bert, "average", "sentence-encoder")
    texts = inputs(classifier)
    for number, names in enumerate(NAMES):
        generator = torch.Generator().manual_seed(number)
        head = F.normalize(torch.randn(len(names), 16, generator=generator), dim=-1)
        model = tuned(classifier, names, number + 1).bert
        merger.add(f"task {number}", model, {**texts, "text_embeds": head, "class_names": list(names)})
    found = merger.predict(texts)
    assert all(label in NAMES[int(task[-1])] for task, label in zip(found.task, found.label, strict=True))
    with pytest.raises(ValueError, match="class_names: 1 names for 2 classes"):
        merger.add("x", model, {**texts, "text_embeds": head[:2], "class_names": ["a"]})


def test_without_samples_predict_says_what_to_do_and_classes_can_be_given(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "average")
    pixels = {"pixel_values": samples[0].inputs["pixel_values"]}
    with pytest.raises(ValueError, match="predict: no task is merged"):
        merger.predict(pixels)
    for number, state in enumerate(tuned_states):
        merger.add(f"task {number}", state)
    with pytest.raises(ValueError, match=r"text_embeds are not known; give them by set_classes\('task 0'"):
        merger.predict(pixels)
    assert math.isnan(merger.evaluate({f"task {i}": part for i, part in enumerate(samples)}).acc_unknown)
    for number, part in enumerate(samples):
        merger.set_classes(f"task {number}", list("abcde"), dict(part.shared))
    assert set(merger.predict(pixels).label) <= set("abcde")
    assert 0 <= merger.evaluate({f"task {i}": part for i, part in enumerate(samples)}).acc_unknown <= 100
    for wrong, message in (
        (dict(name="x"), "task 'x' is not among the merged ones"),
        (dict(name="task 0", class_names=["a"]), "class_names: 1 names for 5 classes"),
        (dict(name="task 0", shared={"embeds": torch.ones(5, 16)}), "'embeds' is nothing that the samples"),
        (dict(name="task 0", shared={"text_embeds": torch.ones(5, 16)}), "are equal"),
    ):
        with pytest.raises(ValueError, match=message):
            merger.set_classes(**wrong)


def test_heads_without_samples_speak_with_the_temperature_1():
    merger = classifiers("distilbert", "average", seeds=False)
    assert [task.temperature for task in merger.merged] == [None, None]
    expected = by_hand(merger, inputs(merger.base))
    found = merger.predict(inputs(merger.base))
    for row, score in enumerate(found.score):
        assert score == pytest.approx(max(part[row].max().item() for part in expected), abs=1e-6)


def test_texts_and_models_of_their_own_have_no_union():
    config = hf.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    base = hf.LlamaForCausalLM(config).eval()
    merger = mingle.Merger(base, "average")
    merger.add("one", copy.deepcopy(base))
    with pytest.raises(ValueError, match=r"predict: the answers of a causal-lm model are texts"):
        merger.predict({"input_ids": torch.ones(2, 3, dtype=torch.long)})
    classifier = made("vit")
    merger = mingle.Merger(classifier, "individual")
    merger.add("one", tuned(classifier, NAMES[0]), inputs(classifier))
    with pytest.raises(ValueError, match="method 'individual' keeps one model per task; use model_for"):
        merger.predict(inputs(classifier))
    labelled = {**inputs(classifier), "labels": torch.zeros(8, dtype=torch.long)}
    assert math.isnan(merger.evaluate({"one": labelled}).acc_unknown)


class Sequences(TaskType):
    """One head that all tasks share: nothing but a router could tell them apart."""

    def logits(self, model, data):
        return model(**data.inputs).logits


def test_a_task_type_of_ones_own_needs_heads_shared_classes_or_a_router():
    base = made("bert")
    models = [tuned(base, NAMES[0], seed) for seed in (1, 2)]
    labelled = {**inputs(base), "labels": torch.zeros(8, dtype=torch.long)}
    for method in METHODS:
        merger = mingle.Merger(base, method, Sequences(), **METHODS[method])
        for number, model in enumerate(models):
            merger.add(f"task {number}", model, inputs(base, seed=number))
        result = merger.evaluate(dict.fromkeys(merger.task_names, labelled))
        if method == "routed":
            assert 0 <= result.acc_unknown <= 100
            assert set(merger.predict(inputs(base)).task) <= set(merger.task_names)
        else:
            assert math.isnan(result.acc_unknown)
            with pytest.raises(
                ValueError, match="tasks of a Sequences model have nothing of their own to be"
            ):
                merger.predict(inputs(base))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_an_unknown_task_counts_only_where_task_and_class_are_right(kind, tmp_path):
    merger = classifiers(kind, "average")
    suite = {}
    for number, name in enumerate(merger.task_names):
        # the longer texts come first: evaluated by length, they are answered in another order
        data = {key: rows.flip(0) for key, rows in inputs(merger.base, 16, seed=22 + number).items()}
        suite[name] = {**data, "labels": (torch.arange(16) % 3 == 0).long()}
    result = merger.evaluate(suite, batch_size=5)
    for place, (name, data) in enumerate(suite.items()):
        found = merger.predict(data)
        right = [
            task == name and label == NAMES[place][int(wanted)]
            for task, label, wanted in zip(found.task, found.label, data["labels"], strict=True)
        ]
        assert result.unknown[-1][place] == pytest.approx(100 * sum(right) / 16)
        served = merger.model_for(name)
        known = served(**{key: data[key] for key in data if key != "labels"}).logits.argmax(1)
        assert result.matrix[-1][place] == pytest.approx(
            100 * (known == data["labels"]).double().mean().item()
        )
        assert result.unknown[-1][place] <= result.matrix[-1][place]
    assert result.acc_unknown == pytest.approx(sum(result.unknown[-1]) / 2)
    merger.save_pretrained(tmp_path)
    assert mingle.Merger.from_pretrained(tmp_path).result() == result


def test_a_folder_of_before_has_no_unknown_tasks(base_model, tuned_states, samples, tmp_path):
    merger = merge(base_model, [{**state} for state in tuned_states], samples, count=2)
    merger.save_pretrained(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["unknown"]
    for task in manifest["tasks"]:
        del task["labels"], task["temperature"]
    path.write_text(json.dumps(manifest))
    again = mingle.Merger.from_pretrained(tmp_path)
    assert again.unknown == [[None], [None, None]]
    assert [(task.labels, task.temperature) for task in again.merged] == [(None, None)] * 2


def test_a_temperature_makes_confidence_the_share_of_equal_answers():
    generator = torch.Generator().manual_seed(0)
    scores, wanted = torch.randn(200, 5, generator=generator) * 8, torch.randn(200, 5, generator=generator)
    wanted[:130] = scores[:130]
    share = ((scores.argmax(1) == wanted.argmax(1)).sum().item() + 1) / 202
    found = temperature(scores, wanted)
    assert (scores.double() / found).softmax(1).amax(1).mean().item() == pytest.approx(share, abs=1e-6)
    assert temperature(3 * scores, wanted) == pytest.approx(3 * found, rel=1e-5)
    assert temperature(scores * math.inf, wanted) is None


def test_one_temperature_serves_all_tasks():
    scores = [torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0, 0.0]])]
    apart = probabilities(scores, [1.0, 4.0], one_scale=False)
    torch.testing.assert_close(apart[0], (scores[0] / 2).softmax(1))
    joined = probabilities(scores, [None, 2.0], one_scale=True)
    torch.testing.assert_close(torch.cat(joined, 1), (torch.cat(scores, 1) / 2).softmax(1))
    untouched = probabilities(scores, [None, None], one_scale=False)
    torch.testing.assert_close(untouched[1], scores[1].softmax(1))
