"""Tasks that leave: the others stay bit for bit, and where the method can, nothing of the task is left."""

from __future__ import annotations

import json

import pytest
import torch
from classifiers import NAMES as CLASSES
from classifiers import inputs, made, tuned
from few_methods import each_method
from small_merges import NAMES, add, everything, same_bits

import mingle
from mingle.tasks import TaskData

SETTINGS = dict(rank=4, steps=2, lr=5e-3, batch_size=8)
BESIDE = "the temperatures that predict weighs the answers of later tasks by were measured beside it"
#: methods with experts → options that make them quick
EXPERTS = {
    "mingle": SETTINGS,
    "mingle-light": SETTINGS,
    "mingle-seq": SETTINGS,
    "mingle-routed": SETTINGS,
    "routed": {"rank": 4},
    "mass": {"rank": 4},
    "made-it": {"spread": 9.0},
    "individual": {},
    "pre-trained": {},
}
SUMS = ["average", "task-arithmetic", "ties", "magmax", "consensus-ta", "opcm", "tsv-m", "iso-c", "wudi"]


def merged(base, tuned, samples, which, method, *, measured=False, **options):
    """A merge of these of the three tasks; where it is to be measured, after every arrival."""
    merger = mingle.Merger(base, method, seed=5, **options)
    for i in which:
        add(merger, i, tuned, samples)
        if measured:
            merger.evaluate(suite(samples))
    return merger


def suite(samples):
    return dict(zip(NAMES, samples, strict=True))


def kept(merger):
    """All that a merger would save of its tasks, and its model's weights."""
    tasks = {f"{i}/{k}": v for i, tensors in enumerate(merger._kept()) for k, v in tensors.items()}
    state = {f"state/{k}": v for k, v in merger.method.state_tensors().items()}
    return tasks | state | {f"model/{k}": v for k, v in merger.model.state_dict().items()}


@each_method(EXPERTS)
def test_the_newest_task_leaves_nothing_behind(base_model, tuned_states, samples, method):
    """What is kept, and every accuracy, is that of a merge that never had it; and it goes on alike."""
    options = EXPERTS[method]
    merger = merged(base_model, tuned_states, samples, (0, 1, 2), method, measured=True, **options)
    without = merged(base_model, tuned_states, samples, (0, 1), method, measured=True, **options)
    assert merger.remove("three") == []
    same_bits(kept(merger), kept(without))
    assert (merger.matrix, merger.unknown, merger.removed) == (without.matrix, without.unknown, [])
    for each in (merger, without):
        add(each, 2, tuned_states, samples)
    same_bits(kept(merger), kept(without))


@pytest.mark.parametrize("method", ["individual", "pre-trained", "mass", "routed"])
@pytest.mark.parametrize("gone", [0, 1])
def test_methods_whose_tasks_do_not_meet_end_as_if_it_had_never_been_there(
    base_model, tuned_states, samples, method, gone
):
    fixed = dict(depths=(1,), spread=True, own_covariance=0.1, shrinkage=0.2, temperature=8.0)
    options = EXPERTS[method] | (fixed if method == "routed" else {})
    rest = [i for i in range(3) if i != gone]
    merger = merged(base_model, tuned_states, samples, range(3), method, **options)
    without = merged(base_model, tuned_states, samples, rest, method, **options)
    assert merger.remove(NAMES[gone]) == ([BESIDE] if method in ("mass", "routed") else [])
    assert merger.task_names == without.task_names
    same_bits(merger.model.state_dict(), without.model.state_dict())
    results = [each.evaluate(suite(samples)) for each in (merger, without)]
    assert results[0].matrix[-1] == results[1].matrix[-1]
    assert results[0].unknown[-1] == results[1].unknown[-1]
    for task in merger.task_names:
        answers = [
            each.task.logits(each.model_for(task), each.task.data(samples[NAMES.index(task)]))
            for each in (merger, without)
        ]
        assert torch.equal(*answers)


def test_of_two_routed_tasks_the_second_is_left_as_if_it_had_been_the_first(
    base_model, tuned_states, samples
):
    merger = merged(base_model, tuned_states, samples, (0, 1), "routed", rank=4)
    without = merged(base_model, tuned_states, samples, (1,), "routed", rank=4)
    assert merger.remove("one") == [BESIDE]
    same_bits(kept(merger), kept(without))


def test_what_chose_a_router_beside_a_task_stays_and_is_said(base_model, tuned_states, samples):
    merger = merged(base_model, tuned_states, samples, range(3), "routed", rank=4)
    before = [merger.method.task_tensors(i) for i in range(3)]
    said = merger.remove("two")
    assert said[0].startswith("the router's depth, setting and temperature are chosen by")
    for now, then in zip((merger.method.task_tensors(i) for i in range(2)), before[::2], strict=True):
        same_bits(now, then)
    assert merger.removed[0].name == "two" and merger.removed[0].stays == said


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize(
    "method",
    [
        "mingle",
        "mingle-routed",
        *(pytest.param(f"mingle-{kind}", marks=pytest.mark.slow) for kind in ("light", "seq")),
    ],
)
def test_experts_gates_and_protection_of_others_stay_bit_for_bit(
    base_model, tuned_states, samples, method, gone
):
    merger = merged(base_model, tuned_states, samples, range(3), method, **EXPERTS[method])
    rest = [i for i in range(3) if i != gone]
    layers = {
        name: [
            (e.A.clone(), e.B.clone(), w, b)
            for e, w, b in zip(layer.experts(), *layer.all_gates(), strict=True)
        ]
        for name, layer in merger.method.layers.items()
    }
    bases = {name: basis.clone() for name, basis in merger.method.bases.items()}
    said = merger.remove(NAMES[gone])
    assert (
        said[0] == "experts and gates of tasks that arrived later were made beside it, and stay as they are"
    )
    assert said[1].startswith("its input directions stay protected")
    assert said[-1] == BESIDE and len(said) == (
        4 if method == "mingle-seq" or method == "mingle-routed" else 3
    )
    for name, experts in layers.items():
        layer = merger.method.layers[name]
        now = zip(layer.experts(), *layer.all_gates(), strict=True)
        for (expert, weight, bias), then in zip(now, (experts[i] for i in rest), strict=True):
            assert all(map(torch.equal, (expert.A, expert.B, weight, bias), then))
    same_bits(merger.method.bases, bases)
    trainable = {n for n, p in merger.model.named_parameters() if p.requires_grad}
    assert trainable and all("frozen" not in n for n in trainable)


def test_the_directions_of_a_task_go_with_it_if_nobody_came_later(base_model, tuned_states, samples):
    """Also past a task that was skipped, which has no file that could hold them."""
    merger = merged(base_model, tuned_states, samples, (0, 1), "mingle", **SETTINGS)
    widths = {name: basis.shape[1] for name, basis in merger.method.bases.items()}
    merger.add("same", base_model, TaskData(samples[1].inputs, samples[1].shared))
    add(merger, 2, tuned_states, samples)
    bases = {name: basis.clone() for name, basis in merger.method.bases.items()}
    assert len(merger.remove("two")) == 3
    same_bits(merger.method.bases, bases)
    merger.remove("three")
    alone = merged(base_model, tuned_states, samples, (0,), "mingle", **SETTINGS)
    same_bits(merger.method.bases, alone.method.bases)
    assert all(basis.shape[1] < widths[name] for name, basis in merger.method.bases.items())
    assert merger.remove("same") == []
    same_bits(everything(merger), everything(alone))


def test_where_all_gates_train_they_all_learned_beside_it(base_model, tuned_states, samples):
    merger = merged(
        base_model, tuned_states, samples, (0, 1), "mingle", measured=True, **SETTINGS | {"gates": "all"}
    )
    assert merger.remove("two") == ["all gates learned beside it, and stay as they are"]
    assert merger.removed[0].tasks == ["one"]
    assert merger.matrix == [[None]]  # the older gate is not what it was when this was measured


@pytest.mark.parametrize("method", [*SUMS, "nufilt", "adamerging", "wemoe"])
def test_sums_are_refused_with_the_reason_and_stay_as_they_are(base_model, tuned_states, samples, method):
    options = {"steps": 1} if method in ("nufilt", "adamerging", "wemoe") else {}
    merger = merged(base_model, tuned_states, samples, (0, 1), method, **options)
    before, model = kept(merger), merger.model
    with pytest.raises(
        ValueError, match=f"task 'one' cannot be removed: method '{method}' .* no single task"
    ):
        merger.remove("one")
    assert merger.model is model and merger.task_names == NAMES[:2]
    same_bits(kept(merger), before)


@pytest.mark.parametrize("method", ["average", "opcm", "tsv-m", "mingle", "routed", "individual"])
def test_the_only_task_leaves_the_base_and_merging_begins_anew(base_model, tuned_states, samples, method):
    options = EXPERTS.get(method, {})
    merger = merged(base_model, tuned_states, samples, (0,), method, **options)
    assert merger.remove("one") == []
    fresh = mingle.Merger(base_model, method, seed=5, **options)
    same_bits(kept(merger), kept(fresh))
    assert (merger.task_names, merger.matrix, merger.unknown) == ([], [], [])
    for each in (merger, fresh):
        add(each, 1, tuned_states, samples)
    same_bits(kept(merger), kept(fresh))


def test_a_shared_expert_of_made_it_is_refused_and_one_of_its_own_leaves(base_model, tuned_states, samples):
    merger = merged(base_model, tuned_states, samples, (0, 1), "made-it")
    twice = TaskData(samples[0].inputs, samples[0].shared)
    merger.add("again", tuned_states[0], twice)
    with pytest.raises(
        ValueError, match="'again' cannot be removed: method 'made-it': in layer '.*' it shares"
    ):
        merger.remove("again")
    assert merger.task_names == ["one", "two", "again"]
    merger = merged(base_model, tuned_states, samples, range(3), "made-it", **EXPERTS["made-it"])
    owned = {name: list(places) for name, places in merger.method.owned.items()}
    assert all(places == [0, 1, 2] for places in owned.values())
    assert merger.remove("one")[1:] == [BESIDE]
    without = merged(base_model, tuned_states, samples, (1, 2), "made-it", **EXPERTS["made-it"])
    same_bits(kept(merger), kept(without))


def test_results_and_what_is_noted_follow(base_model, tuned_states, samples, tmp_path):
    merger = merged(base_model, tuned_states, samples, range(3), "mingle", measured=True, **SETTINGS)
    rows = [list(row) for row in merger.matrix]
    merger.metadata = {
        "inputs": {name: {"model": name} for name in NAMES},
        "steps": [{"task": name} for name in NAMES],
        "mine": 1,
    }
    stays = merger.remove("two")
    assert merger.matrix == [rows[0], [None, None]]
    assert merger.metadata == {
        "inputs": {name: {"model": name} for name in ("one", "three")},
        "steps": [{"task": "one"}, {"task": "three"}],
        "mine": 1,
    }
    merger.evaluate(suite(samples))
    merger.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["removed"] == [
        {"name": "two", "stays": stays, "tasks": ["three"]}
    ]
    back = mingle.Merger.from_pretrained(tmp_path)
    assert back.removed == merger.removed and back.matrix == merger.matrix
    same_bits(kept(back), kept(merger))
    for each in (merger, back):
        add(each, 1, tuned_states, samples)  # its name is free again
    same_bits(kept(back), kept(merger))
    for name in ("one", "three", "two"):
        merger.remove(name)
    assert merger.removed == []  # nothing of any task is left


def test_unknown_names_are_refused_with_the_nearest(base_model, tuned_states, samples):
    merger = merged(base_model, tuned_states, samples, (0, 1), "individual")
    with pytest.raises(
        ValueError, match=r"'twoo' is not among the merged ones: one, two; did you mean 'two'\?"
    ):
        merger.remove("twoo")
    merger.remove("two")
    with pytest.raises(ValueError, match="'two' is not among the merged ones: one"):
        merger.remove("two")


def test_heads_and_names_of_classes_follow():
    merger = mingle.Merger(made("vit"), "mass", rank=2)
    for number, classes in enumerate(CLASSES):
        merger.add(f"task {number}", tuned(merger.base, classes, number), inputs(merger.base, seed=number))
    merger.remove("task 1")
    assert tuple(merger.model.config.id2label.values()) == CLASSES[0]
    assert merger.model(**inputs(merger.base)).logits.shape == (8, len(CLASSES[0]))
    assert set(merger.predict(inputs(merger.base)).task) == {"task 0"}
    merger.remove("task 0")
    assert merger.model.config.id2label == merger.base.config.id2label


def test_an_interruption_leaves_the_merger_as_it_was(base_model, tuned_states, samples, monkeypatch):
    merger = merged(base_model, tuned_states, samples, range(3), "mingle", **SETTINGS)
    before, model = kept(merger), merger.model
    with monkeypatch.context() as patch:
        patch.setattr(type(merger.method), "restore", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merger.remove("two")
    assert merger.model is model and merger.task_names == NAMES
    same_bits(kept(merger), before)
    assert len(merger.remove("two")) == 3
