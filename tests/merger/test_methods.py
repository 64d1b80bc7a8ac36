"""Every weight-space method against its formula, re-computed plainly on hand-sized towers."""

from __future__ import annotations

import math

import pytest
import torch

import mingle
from mingle.methods import METHODS, get
from mingle.methods.opcm import split_rank


def merged_tower(merger):
    return {name: tensor.double() for name, tensor in merger.model.vision_model.state_dict().items()}


def wide(state):
    return {name: tensor.double() for name, tensor in state.items()}


def run(base_model, method, tuned, **options):
    merger = mingle.Merger(base_model, method, **options)
    for i, state in enumerate(tuned):
        merger.add(f"task{i}", state)
    return merged_tower(merger)


def assert_same(got, expected, tolerance=2e-6):
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_average(base_model, tuned_states):
    states = [wide(s) for s in tuned_states]
    assert_same(run(base_model, "average", tuned_states), {k: sum(s[k] for s in states) / 3 for k in states[0]})


def test_task_arithmetic(base_model, tuned_states):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    expected = {k: base[k] + 0.2 * sum(s[k] - base[k] for s in states) for k in base}
    assert_same(run(base_model, "task-arithmetic", tuned_states, scaling=0.2), expected)


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_opcm(base_model, tuned_states, drop_diagonal):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    linear = {f"{n}.weight" for n, m in base_model.vision_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linear) == 12
    M, scale, norms = None, 1.0, []
    for state in states:
        delta = {k: state[k] - base[k] for k in base}
        norms.append(math.sqrt(sum(float(d.square().sum()) for d in delta.values())))
        if M is None:
            M = delta
            continue
        raw = {}
        for k, d in delta.items():
            if k in linear:
                U, S, Vh = torch.linalg.svd(M[k], full_matrices=True)
                cumulative = S.cumsum(0) / S.sum()
                s = next(i for i, c in enumerate(cumulative.tolist()) if c > 0.5)
                C = U.T @ d @ Vh.T
                C[:s, :s] = 0
                if drop_diagonal:
                    C.diagonal().zero_()
                d = U @ C @ Vh
            raw[k] = scale * M[k] + d
        mean = sum(norms) / len(norms)
        scale = math.sqrt(sum(float(r.square().sum()) for r in raw.values())) / mean
        M = {k: r / scale for k, r in raw.items()}
    assert_same(run(base_model, "opcm", tuned_states, drop_diagonal=drop_diagonal), {k: base[k] + M[k] for k in base})


def test_opcm_split_rank():
    assert split_rank(torch.tensor([5.0, 3.0, 2.0]), 0.5) == 1
    assert split_rank(torch.tensor([6.0, 3.0, 1.0]), 0.5) == 0
    assert split_rank(torch.ones(4), 0.5) == 2


def test_reference_rows(base_model, tuned_states):
    base = wide(base_model.vision_model.state_dict())
    assert_same(run(base_model, "pre-trained", tuned_states), base, tolerance=0)
    merger = mingle.Merger(base_model, "individual")
    for i, state in enumerate(tuned_states):
        merger.add(f"task{i}", state)
    for i, state in enumerate(tuned_states):
        merger.model_for(f"task{i}")
        assert_same(merged_tower(merger), wide(state), tolerance=0)


def test_unknown_names_and_options_are_refused_with_the_nearest_known_one(base_model):
    assert set(METHODS) == {
        "pre-trained",
        "individual",
        "average",
        "task-arithmetic",
        "opcm",
        "nufilt",
        "mingle",
        "mingle-light",
        "mingle-seq",
    }
    with pytest.raises(ValueError, match="unknown method 'minge'; did you mean 'mingle'"):
        get("minge")
    with pytest.raises(ValueError, match="unknown option 'gama'; did you mean 'gamma'"):
        mingle.Merger(base_model, "mingle", gama=1.0)
    with pytest.raises(ValueError, match="rank: 'many' is not of type int"):
        mingle.Merger(base_model, "mingle", rank="many")
    with pytest.raises(ValueError, match="rank=0"):
        mingle.Merger(base_model, "mingle", rank=0)
