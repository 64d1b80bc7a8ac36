"""A merged model asked for single answers, with all of its tasks and with some of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import played_merges
import pytest
import torch
from played_merges import CLASSES, TASKS
from tiny_merge import contents
from trial_answers import first

from mingle.merging.merger import Merger
from mingle.methods.gated import GatedMethod
from mingle.methods.routing import RouterMethod
from mingle.nn.observe import observed
from mingle.runs.play.try_out import TryOut

METHODS = [name for name in played_merges.OPTIONS if name not in ("individual", "pre-trained")]


GATED = [name for name in METHODS if name != "average"]


def by_hand(model, task, try_out, given):
    """The probabilities of the classes of a task, from a pass of its own with the task's head."""
    merger = try_out.merger
    served = merger.model_for(task)
    head = {name: served.state_dict()[name] for name in merger.merged[0].tensors}
    state = model.state_dict() | head
    with torch.no_grad():
        logits = torch.func.functional_call(model, state, (), try_out.reader(given)).logits
    return logits[0].softmax(0).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_with_all_tasks_it_is_the_answer_of_predict(vit, picture, method):
    try_out = TryOut.of(vit(method))
    trial = try_out.trial(picture, TASKS)
    found = try_out.merger.predict(try_out.reader(picture))
    assert first(trial.merged) == (found.task[0], found.label[0], found.score[0])
    shares = [each.probability for each in trial.merged.classes]
    assert shares == sorted(shares, reverse=True)
    if isinstance(try_out.merger.method, RouterMethod):
        assert sum(trial.routing.shares.values()) == pytest.approx(1)
        assert max(trial.routing.shares, key=trial.routing.shares.get) == found.task[0]
        assert {each.task for each in trial.merged.classes} == {found.task[0]}
    else:
        assert len(shares) == 5 and "has no router: the likeliest of all classes" in trial.routing.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_task_that_is_switched_off_answers_nothing_and_its_expert_is_still(vit, picture, method):
    folder = vit(method)
    before = contents(folder)
    try_out = TryOut.of(folder)
    whole = try_out.trial(picture, TASKS)
    for place, kept in enumerate(TASKS):
        trial = try_out.trial(picture, [kept])
        for answer in (trial.merged, trial.base):
            assert {(each.task, each.label) for each in answer.classes} == {(kept, c) for c in CLASSES[place]}
        if isinstance(try_out.merger.method, RouterMethod):
            assert trial.routing.shares == {kept: 1}
        if method in GATED:
            column = [row[1 - place] for row in trial.gates.values]
            shared = method == "made-it"  # tasks may have one expert together
            assert all(value == 0 or (shared and value == 1) for value in column) and 0 in column
            assert any(row[place] for row in trial.gates.values)
    assert try_out.trial(picture, TASKS) == whole
    assert contents(folder) == before
    if method in ("mingle", "wemoe"):  # no router, which gives gates anew at every call
        assert all(layer.given_gates is None for layer in try_out.merger.method.layers.values())


@pytest.mark.parametrize("method", [name for name in GATED if name != "made-it"])
def test_what_answers_is_the_model_without_the_others_experts(vit, picture, method):
    """The same as a model from which the experts of the other task were really taken."""
    try_out = TryOut.of(vit(method))
    trial = try_out.trial(picture, [TASKS[1]])
    other = Merger.from_pretrained(vit(method))
    gated = other.method
    assert isinstance(gated, GatedMethod)
    for layer in gated.layers.values():
        layer.set_expert(0, 0 * layer.A[0], 0 * layer.B[0])
    if isinstance(gated, RouterMethod):
        gated.router.router.among = torch.tensor([False, True])
    shares = by_hand(other.model, TASKS[1], try_out, picture)
    temperatures = [other.merged[1].temperature]
    logits = torch.tensor(shares).log() / temperatures[0]
    best = logits.softmax(0).max().item()
    assert trial.merged.classes[0].probability == pytest.approx(best, abs=1e-5)


def test_a_softmax_of_alignments_is_one_over_the_active_tasks(vit, picture):
    try_out = TryOut.of(vit("made-it"))
    both = torch.tensor(try_out.trial(picture, TASKS).gates.values)
    owned = try_out.merger.method.owned
    apart = [number for number, places in enumerate(owned.values()) if places[0] != places[1]]
    assert apart
    assert torch.allclose(both[apart].sum(1), torch.ones(len(apart), dtype=both.dtype))
    alone = torch.tensor(try_out.trial(picture, [TASKS[0]]).gates.values)
    assert torch.allclose(alone[apart], torch.tensor([1.0, 0.0], dtype=alone.dtype).expand(len(apart), 2))


@pytest.mark.parametrize("method", GATED)
def test_an_expert_alone_is_the_base_with_its_update_in_the_weights(vit, picture, method):
    try_out = TryOut.of(vit(method))
    merger = try_out.merger
    trial = try_out.trial(picture, [])
    for place, name in enumerate(TASKS):
        folded = Merger.from_pretrained(vit(method)).base
        tower = folded.get_submodule(merger.task.tower(folded))
        tower.load_state_dict(merger.method.folded(place, None).tower, strict=False)
        shares = by_hand(folded, name, try_out, picture)
        answer = trial.experts[name]
        assert [each.label for each in answer.classes] == [
            CLASSES[place][c] for c in sorted(range(len(shares)), key=lambda c: -shares[c])
        ]
        assert answer.classes[0].probability == pytest.approx(max(shares), abs=1e-5)


def test_the_base_answers_with_the_heads_of_the_active_tasks(vit, picture):
    try_out = TryOut.of(vit("average"))
    trial = try_out.trial(picture, TASKS)
    shares = [by_hand(try_out.merger.base, name, try_out, picture) for name in TASKS]
    best = max(max(part) for part in shares)
    assert trial.base.classes[0].probability == pytest.approx(best, abs=1e-6)
    assert {answer.reason for answer in trial.experts.values()} == {
        "method 'average' keeps no expert of a task"
    }
    assert "has no gates" in trial.gates.reason


@pytest.mark.parametrize("method", ["mingle", "mingle-routed", "routed"])
def test_gates_are_those_of_the_answer_and_not_of_the_router_s_look_at_the_base(vit, picture, method):
    """The router of `routed` looks behind the first of two blocks: their layers are called more than once."""
    try_out = TryOut.of(vit(method))
    merger, last = try_out.merger, {}

    def note(name, layer, x):
        gates = layer.gates(x)
        if gates.dim() > 1:  # and not 0 for all samples, as in the router's look
            last[name] = gates.double().flatten(0, -2).mean(0)

    with observed(merger.method.layers, note), torch.no_grad():
        merger.task.logits(merger.model, merger.task.data(try_out.reader(picture)))
    found = try_out.trial(picture, TASKS).gates
    assert found.layers == tuple(last) and found.tasks == TASKS
    assert torch.allclose(torch.tensor(found.values).double(), torch.stack(list(last.values())))
    if method == "routed":
        shares = [*try_out.trial(picture, TASKS).routing.shares.values()]
        assert all(row == pytest.approx(shares, abs=1e-6) for row in found.values)


def test_a_strange_input_is_left_to_the_base(vit, picture, monkeypatch):
    try_out = TryOut.of(vit("routed"))
    monkeypatch.setattr(try_out.merger.method.router.router, "limits", torch.zeros(2))
    trial = try_out.trial(picture, TASKS)
    likeliest = max(trial.routing.shares, key=trial.routing.shares.get)
    assert trial.routing.strange
    assert not any(map(any, trial.gates.values))
    place = TASKS.index(likeliest)
    shares = by_hand(try_out.merger.base, likeliest, try_out, picture)
    assert first(trial.merged)[:2] == (likeliest, CLASSES[place][shares.index(max(shares))])


@pytest.mark.parametrize("method", ["average", "individual", "routed"])
def test_without_any_task_there_is_nothing_to_choose_from(vit, picture, method):
    trial = TryOut.of(vit(method)).trial(picture, [])
    assert not trial.base.classes and "no task is active" in trial.base.reason
    assert not trial.merged.classes and trial.merged.reason


def test_individual_models_answer_each_for_themselves(vit, picture):
    try_out = TryOut.of(vit("individual"))
    trial = try_out.trial(picture, TASKS)
    assert "one model per task" in trial.merged.reason
    for place, name in enumerate(TASKS):
        shares = by_hand(try_out.merger.model_for(name), name, try_out, picture)
        label = CLASSES[place][shares.index(max(shares))]
        assert first(trial.experts[name]) == (name, label, max(shares))


def test_the_same_input_is_not_computed_again_for_what_cannot_change(vit, picture):
    try_out = TryOut.of(vit("mingle"))
    calls = []
    try_out.merger.model.register_forward_hook(lambda *_: calls.append(1))
    try_out.trial(picture, TASKS)
    assert len(calls) == 2 + 2  # the merged model with two heads, and two experts
    try_out.trial(picture, [TASKS[0]])
    assert len(calls) == 4 + 1


def test_trials_come_one_model_at_a_time(vit, picture):
    found = list(TryOut.of(vit("routed")).trials(picture, TASKS))
    assert [(each.base is not None, len(each.experts)) for each in found] == [
        (False, 0), (True, 0), (True, 1), (True, 2)
    ]  # fmt: skip
    assert {each.merged for each in found} == {found[0].merged}


def test_several_threads_may_ask(vit, picture):
    try_out = TryOut.of(vit("routed"))
    asked = [TASKS, TASKS[:1], TASKS[1:], ()] * 2
    expected = [try_out.trial(picture, active) for active in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda active: try_out.trial(picture, active), asked)) == expected
