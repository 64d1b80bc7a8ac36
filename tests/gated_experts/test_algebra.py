"""What follows from the formula, on the grouped backend: linearity, order, tokens apart, equal bits."""

from __future__ import annotations

import math

import pytest
import torch
from drawn_problems import GATES, make, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mingle.functional import gated_experts


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems(), st.floats(-3, 3), st.floats(-3, 3))
def test_the_update_is_linear_in_the_gates(problem, a, b):
    tensors = {
        name: tensor.double() for name, tensor in problem.tensors.items() if not name.startswith("gate")
    }
    shape = (*tensors["x"].shape[:-1], len(tensors["A"]))
    first, second = torch.randn(2, *shape, dtype=torch.float64)

    def update(gates: Tensor) -> Tensor:
        return (
            gated_experts(**tensors, gate_weight=None, gate_bias=None, gates=gates, backend="grouped") - base
        )

    base = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    torch.testing.assert_close(
        update(a * first + b * second), a * update(first) + b * update(second), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("gates", GATES)
def test_the_order_of_the_experts_does_not_matter(gates):
    problem = make((3, 4), 7, 6, 9, 3, torch.float64, gates, zeros="many")
    order = torch.randperm(9)
    moved = {
        name: tensor[order]
        for name, tensor in problem.tensors.items()
        if name in ("A", "B", "gate_weight", "gate_bias")
    }
    if "gates" in problem.tensors:
        moved["gates"] = problem.tensors["gates"][..., order]
    permuted = problem._replace(tensors=problem.tensors | moved)
    torch.testing.assert_close(
        permuted.solve("grouped")["y"], problem.solve("grouped")["y"], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("gates", GATES)
def test_an_expert_is_the_sum_of_its_ranks(gates):
    whole = make((3, 4), 7, 6, 4, 3, torch.float64, gates)
    split = {
        name: tensor.repeat_interleave(3, -1 if name == "gates" else 0)
        for name, tensor in whole.tensors.items()
        if "gate" in name
    }
    split["A"] = whole.tensors["A"].reshape(12, 1, 7)
    split["B"] = whole.tensors["B"].mT.reshape(12, 6, 1)
    ranks = whole._replace(tensors=whole.tensors | split)
    torch.testing.assert_close(
        ranks.solve("grouped")["y"], whole.solve("grouped")["y"], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("gates", ["token", "given token"])
@pytest.mark.parametrize("zeros", ["none", "shuffled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_one_token_stays_in_that_token(gates, zeros, bad):
    problem = make((3, 5), 16, 12, 4, 3, torch.float32, gates, zeros=zeros, needs={"x"})
    clean = problem.solve("grouped")
    problem.tensors["x"][1, 2] = bad
    got = problem.solve("grouped")
    others = torch.ones(3, 5, dtype=torch.bool)
    others[1, 2] = False
    assert not got["y"][1, 2].isfinite().any()
    assert all(torch.equal(got[name][others], clean[name][others]) for name in ("y", "x"))


@pytest.mark.parametrize("gates", ["sample", "given sample"])
def test_a_sample_that_is_not_finite_touches_no_other(gates):
    problem = make((3, 5), 16, 12, 4, 3, torch.float32, gates, needs={"x"})
    clean = problem.solve("grouped")
    problem.tensors["x"][1, 2] = math.nan
    got = problem.solve("grouped")
    assert all(torch.equal(got[name][[0, 2]], clean[name][[0, 2]]) for name in ("y", "x"))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("zeros", ["none", "shuffled"])
@pytest.mark.parametrize("needs", [None, {"x"}, set()], ids=["all", "x", "nothing"])
def test_fifty_repetitions_give_equal_bits(gates, zeros, needs):
    problem = make((5, 13), 33, 47, 5, 7, torch.float32, gates, zeros=zeros, needs=needs)
    first = problem.solve("grouped")
    for _ in range(50):
        again = problem.solve("grouped")
        assert all(torch.equal(again[name], first[name]) for name in first)
