"""What each step of merging cost: steps lead from the fine-tuned model to the merged one, and each is what it
says."""

from __future__ import annotations

import copy
from functools import cached_property

import pytest
import torch

import mingle
from mingle import suites
from mingle.merging.evaluate import accuracy
from mingle.merging.explain import STEPS, explain
from mingle.nn.observe import gates_made_of

OWN = ["other tensors", "rank", "projection", "own gate", "older tasks", "newer tasks"]


class Merged:
    """Three small tasks merged by a method, each measured right after it was merged."""

    def __init__(self, method, **options):
        suite = suites.load("glyphs4", samples_per_class=1)
        self.names = list(suite)[:3]
        self.models = {name: suite.expert(name) for name in self.names}
        self.samples = {name: suite[name] for name in self.names}
        self.merger = mingle.Merger(suite.base, method, **options)
        for name in self.names:
            self.merger.add(name, self.models[name], suite.seeds(name))
            self.merger.evaluate(self.samples)

    def tuned(self, name):
        """The task's fine-tuned model, as the reference row serves it."""
        merger = mingle.Merger(self.merger.base, "individual")
        merger.add(name, self.models[name])
        return merger.model_for(name)

    @cached_property
    def explained(self):
        """The explanation, and the tasks in the order in which they were told."""
        told = []
        return explain(self.merger, self.samples, self.models, on_task=told.append), told


@pytest.fixture(scope="module")
def gated(few_images):
    return Merged("mingle", rank=8, lr=4e-3, steps=8, k=2)


@pytest.fixture(scope="module")
def routed(few_images):
    return Merged("routed", rank=8)


def test_steps_lead_from_the_fine_tuned_model_to_the_merged_one(gated):
    found, told = gated.explained
    assert told == [each.task for each in found] == gated.names
    for place, each in enumerate(found):
        assert list(each.changes) == OWN and set(OWN) <= set(STEPS)
        assert each.before + sum(each.changes.values()) == pytest.approx(each.merged)
        assert each.merged == gated.merger.matrix[-1][place]
        when = each.merged - each.changes["newer tasks"]
        assert when == pytest.approx(gated.merger.matrix[place][place])
        assert each.start == "fine-tuned"
        model = gated.tuned(each.task)
        assert each.before == accuracy(gated.merger.task, model, gated.samples[each.task])
    first, second, last = (each.changes for each in found)
    assert first["projection"] == first["older tasks"] == last["newer tasks"] == 0
    assert second["projection"] != 0  # glyph models have not room for many experts


def test_experts_alone_are_what_folding_them_gives(gated):
    """The accuracy after `rank` and after `projection`, from plain weights made here."""
    merger, name = gated.merger, gated.names[1]
    each = gated.explained[0][1]
    tuned = gated.tuned(name).state_dict()
    values = [each.before]
    for step in OWN[:3]:
        values.append(values[-1] + each.changes[step])
    for number, expert in ((2, "truncated"), (3, "own")):
        model = copy.deepcopy(merger.base)
        weights = model.state_dict()
        for layer, module in merger.method.layers.items():
            key = f"{merger.task.tower(model)}.{layer}.weight"
            if expert == "truncated":
                U, S, V = torch.linalg.svd((tuned[key] - weights[key]).double(), full_matrices=False)
                delta = U[:, :8] * S[:8] @ V[:8]
            else:
                delta = module.B[1].double() @ module.A[1].double()
            weights[key] += delta.float()
        model.load_state_dict(weights)
        found = accuracy(merger.task, model, gated.samples[name])
        assert values[number] == pytest.approx(found, abs=1.3)  # one sample of 100 may be on the edge


def test_a_router_is_one_step(routed):
    for place, each in enumerate(routed.explained[0]):
        assert list(each.changes) == ["other tensors", "rank", "routing"]
        assert each.before + sum(each.changes.values()) == pytest.approx(each.merged)
        assert each.merged == routed.merger.matrix[-1][place]


def test_without_fine_tuned_models_it_starts_from_the_experts(gated, routed):
    whole, _ = gated.explained
    for each, known in zip(explain(gated.merger, gated.samples), whole, strict=True):
        assert each.start == "own expert" and list(each.changes) == OWN[3:]
        skipped = sum(known.changes[step] for step in OWN[:3])
        assert each.before == pytest.approx(known.before + skipped)
        assert each.merged == known.merged
    assert {tuple(each.changes) for each in explain(routed.merger, routed.samples)} == {("routing",)}


def test_plain_weights_are_what_tasks_do_to_each_other(few_images):
    merged = Merged("opcm")
    for place, each in enumerate(merged.explained[0]):
        assert list(each.changes) == ["other tensors", "older tasks", "newer tasks"]
        assert each.changes["other tensors"] == 0  # it merges all of them
        when = each.before + each.changes["older tasks"]
        assert when == pytest.approx(merged.merger.matrix[place][place])
        assert each.before + sum(each.changes.values()) == pytest.approx(each.merged)
    merged.merger.matrix = [[None] * len(row) for row in merged.merger.matrix]
    assert {tuple(each.changes) for each in explain(merged.merger, merged.samples, merged.models)} == {
        ("other tensors", "all tasks")
    }
    with pytest.raises(ValueError, match=f"task '{merged.names[0]}': method 'opcm' keeps no expert"):
        explain(merged.merger, merged.samples)


def test_what_is_missing_is_named(gated):
    samples = dict(gated.samples)
    samples.pop(gated.names[1])
    with pytest.raises(ValueError, match=f"no samples of the merged task '{gated.names[1]}'"):
        explain(gated.merger, samples)
    with pytest.raises(ValueError, match=f"task '{gated.names[0]}': .*"):
        explain(gated.merger, gated.samples, {gated.names[0]: {"a": torch.zeros(1)}})


@pytest.mark.parametrize("kind", ["gated", "routed"])
def test_gates_are_given_back(kind, request):
    merger = request.getfixturevalue(kind).merger
    layers, data = merger.method.layers, request.getfixturevalue(kind).samples
    name = next(iter(data))
    before = accuracy(merger.task, merger.model, data[name])
    with gates_made_of(layers, torch.zeros_like):
        none = accuracy(merger.task, merger.model, data[name])
    assert none == accuracy(merger.task, merger.base, data[name]) != before
    assert accuracy(merger.task, merger.model, data[name]) == before
    with pytest.raises(ZeroDivisionError), gates_made_of(layers, lambda gates: 1 / 0):
        accuracy(merger.task, merger.model, data[name])
    if kind == "gated":
        assert all(layer.given_gates is None for layer in layers.values())
    assert accuracy(merger.task, merger.model, data[name]) == before
