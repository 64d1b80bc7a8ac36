"""No method makes or saves a number that is not finite, whatever the models that arrive."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from few_methods import UNLIKE
from merge_files import merge_file
from small_merges import same_bits

import mingle
from mingle.cli import main
from mingle.io.merger_folder import state_hash
from mingle.merging.finite import NonFiniteMerge
from mingle.methods import METHODS
from mingle.methods.opcm import split_rank
from mingle.methods.task_arithmetic import TaskArithmetic
from mingle.tasks import TaskData

CHEAP = dict(steps=2, rank=4, later_rank=2, batch_size=8, r_p=4, r_v=2, r_l=4, depths=(0, 1))


def merger_of(base_model, method):
    known = {field.name for field in dataclasses.fields(METHODS[method].Options)}
    return mingle.Merger(base_model, method, **{k: v for k, v in CHEAP.items() if k in known})


@pytest.fixture
def arrivals(base_model, tuned_states):
    """Towers by what is odd about them."""
    base = {name: tensor.clone() for name, tensor in base_model.vision_model.state_dict().items()}
    one_layer = base | {
        name: tensor for name, tensor in tuned_states[1].items() if "layers.0.mlp.fc1" in name
    }
    return {
        "a probe": base,
        "another probe": dict(base),
        "real": tuned_states[0],
        "the same again": tuned_states[0],
        "back again": {name: 2 * base[name] - tuned_states[0][name] for name in base},
        "one layer": one_layer,
    }


ORDERS = [
    ("a probe", "another probe", "real", "the same again"),
    ("real", "a probe", "the same again"),
    ("real", "back again", "one layer"),
    ("one layer", "a probe", "real"),
]


def odd_merges():
    """The first order, which has most that is odd, with every method, the third with unlike ones; the rest
    is slow.
    """
    for place, order in enumerate(ORDERS):
        for method in METHODS:
            plain = place == 0 or (place == 2 and method in UNLIKE)
            name = f"{method}-{' - '.join(order)}"
            yield pytest.param(method, order, marks=[] if plain else pytest.mark.slow, id=name)


@pytest.mark.parametrize(("method", "order"), list(odd_merges()))
def test_odd_task_vectors_leave_a_finite_model_that_loads(
    method, order, base_model, arrivals, samples, tmp_path
):
    merger = merger_of(base_model, method)
    alike = {"pixel_values": samples[0].inputs["pixel_values"][:1].expand(6, -1, -1, -1)}
    for i, name in enumerate(order):
        mine = samples[i % len(samples)]
        seeds = TaskData(alike if i == 1 else mine.inputs, mine.shared)
        merger.add(name, arrivals[name], seeds)
    assert all(tensor.isfinite().all() for tensor in merger.model.state_dict().values())
    merger.save_pretrained(tmp_path)
    again = mingle.Merger.from_pretrained(tmp_path)
    same_bits(again.model.state_dict(), merger.model.state_dict())


def test_opcm_after_two_probes_is_the_real_task_vector_at_the_mean_norm(base_model, arrivals):
    merger = merger_of(base_model, "opcm")
    for name in ORDERS[0][:3]:
        merger.add(name, arrivals[name])
    for name, tensor in merger.model.vision_model.state_dict().items():
        start = arrivals["a probe"][name].double()
        expected = start + (arrivals["real"][name].double() - start) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_no_direction_of_a_zero_merge_is_protected():
    assert split_rank(torch.zeros(5), 0.5) == 0


def spoil(monkeypatch, at):
    """Task arithmetic gives a NaN at that arrival."""
    sound = TaskArithmetic.update

    def update(self, arrival):
        merged, state = sound(self, arrival)
        if arrival.index == at:
            merged["post_layernorm.weight"] = merged["post_layernorm.weight"].clone()
            merged["post_layernorm.weight"][3] = float("nan")
        return merged, state

    monkeypatch.setattr(TaskArithmetic, "update", update)


def test_a_method_that_gives_nan_is_named_and_changes_nothing(
    base_model, tuned_states, tmp_path, monkeypatch
):
    merger = mingle.Merger(base_model, "task-arithmetic")
    merger.add("one", tuned_states[0])
    merger.save_pretrained(tmp_path)
    before = state_hash(merger.model)
    with monkeypatch.context() as patch:
        spoil(patch, 1)
        expected = (
            r"method 'task-arithmetic', task 'two': .*post_layernorm.weight: 1 of 32 .* first at \(3,\)"
        )
        with pytest.raises(NonFiniteMerge, match=expected):
            merger.add("two", tuned_states[1])
    assert merger.task_names == ["one"]
    assert state_hash(merger.model) == before
    merger.add("two", tuned_states[1])
    straight = mingle.Merger(base_model, "task-arithmetic")
    for name, tuned in zip(("one", "two"), tuned_states, strict=False):
        straight.add(name, tuned)
    same_bits(merger.model.state_dict(), straight.model.state_dict())


def test_what_became_nan_later_is_not_saved(base_model, tuned_states, tmp_path):
    merger = mingle.Merger(base_model, "average")
    merger.add("one", tuned_states[0])
    merger.save_pretrained(tmp_path)
    merger.add("two", tuned_states[1])
    with torch.no_grad():
        merger.model.vision_model.post_layernorm.bias[0] = float("inf")
    with pytest.raises(NonFiniteMerge, match="nothing was saved"):
        merger.save_pretrained(tmp_path)
    assert mingle.Merger.from_pretrained(tmp_path).task_names == ["one"]


def test_a_merge_that_gives_nan_keeps_what_was_merged_and_goes_on(
    base_folder, tuned_folders, tmp_path, monkeypatch, capsys
):
    experts = {f"t{i}": folder for i, folder in enumerate(tuned_folders)}
    config = merge_file(tmp_path, base_folder, experts, "task-arithmetic")
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        assert main(["merge", str(config), "--out", str(tmp_path / "out")]) != 0
    assert "task 't2'" in capsys.readouterr().out
    assert mingle.Merger.from_pretrained(tmp_path / "out").task_names == ["t0", "t1"]
    assert main(["merge", str(config), "--out", str(tmp_path / "out")]) == 0
    straight = mingle.Merger(base_folder, "task-arithmetic", scaling=0.3)
    for i, folder in enumerate(tuned_folders):
        straight.add(f"t{i}", folder)
    same_bits(mingle.Merger.from_pretrained(tmp_path / "out").model.state_dict(), straight.model.state_dict())


def test_a_sum_too_large_for_a_half_precision_base_is_refused(base_model, tuned_states):

    base = copy.deepcopy(base_model).half()
    huge = {name: tensor + 4e4 for name, tensor in tuned_states[0].items()}
    merger = mingle.Merger(base, "task-arithmetic", scaling=1.0)
    merger.add("one", huge)
    with pytest.raises(NonFiniteMerge, match="task 'two'"):
        merger.add("two", huge)
    assert all(tensor.isfinite().all() for tensor in merger.model.state_dict().values())


def test_a_base_with_nan_is_refused_at_once(base_model):

    base = copy.deepcopy(base_model)
    with torch.no_grad():
        base.vision_model.post_layernorm.bias[2] = float("nan")
    with pytest.raises(ValueError, match=r"base.*post_layernorm.bias: 1 of 32 .*first at \(2,\)"):
        mingle.Merger(base, "average")
