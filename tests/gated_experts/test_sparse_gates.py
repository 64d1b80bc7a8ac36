"""The grouped backend where most gates are zero: an expert runs on its own tokens only."""

from __future__ import annotations

import pytest
import torch
from drawn_problems import LIMITS, make

from mingle.functional import gated_experts
from mingle.kernels.gated_experts import grouped


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call of the path that goes expert by expert."""
    calls: list[int] = []
    plain = grouped.routed
    monkeypatch.setattr(grouped, "routed", lambda *arguments: (calls.append(1), plain(*arguments))[1])
    return calls


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gates", ["given token", "given sample"])
@pytest.mark.parametrize("zeros", ["many", "sorted", "shuffled"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "samples last", "sliced"])
def test_sparse_gates_are_routed_and_exact(dtype, gates, zeros, layout, routed):
    for needs, calls in ((set(), 1), ({"x"}, 2)):
        problem = make(
            (6, 5),
            24,
            20,
            7,
            3,
            dtype,
            gates,
            zeros=zeros,
            needs=needs,
            layouts=dict(x=layout, upstream=layout),
        )
        exact, got = problem.exact(), problem.solve("grouped")
        assert len(routed) == calls
        routed.clear()
        for name, value in exact.items():
            assert (got[name].double() - value).norm() <= LIMITS[dtype] * value.norm(), name


def test_one_row_of_sparse_gates_for_all_tokens_is_routed_below_the_folding_threshold(routed):
    for tokens, calls in ((5, 1), (60, 0)):
        problem = make((tokens,), 24, 20, 7, 3, torch.float32, "given batch", zeros="shuffled", needs=set())
        exact, got = problem.exact()["y"], problem.solve("grouped")["y"]
        assert (got - exact).norm() <= 2e-6 * exact.norm()
        assert len(routed) == calls
        routed.clear()


@pytest.mark.parametrize("needs", [{"gates"}, {"A"}, {"B"}, None], ids=str)
def test_gates_and_experts_that_learn_are_never_routed(needs, routed):
    """A gate of 0 has a gradient."""
    problem = make((6, 5), 24, 20, 7, 3, torch.float32, "given sample", zeros="sorted", needs=needs)
    exact, got = problem.exact(), problem.solve("grouped")
    assert not routed
    for name, value in exact.items():
        assert (got[name] - value).norm() <= 2e-6 * value.norm(), name
    assert "gates" not in got or (got["gates"] != 0).all()


def test_without_a_tape_parameters_may_be_routed(routed):
    problem = make((6, 5), 24, 20, 7, 3, torch.float32, "given sample", zeros="sorted")
    tensors = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    with torch.no_grad():
        gated_experts(**tensors, gate_weight=None, gate_bias=None)
    assert routed


def test_dense_gates_are_not_routed(routed):
    make((6, 5), 24, 20, 7, 3, torch.float32, "given sample", needs=set()).solve("grouped")
    assert not routed


@pytest.mark.parametrize("gates", ["given token", "given sample", "given batch"])
@pytest.mark.parametrize("needs", [set(), {"x"}], ids=["nothing", "x"])
def test_gates_of_zero_leave_the_base(gates, needs):
    problem = make((6, 5), 24, 20, 7, 3, torch.float32, gates, needs=needs)
    problem.tensors["gates"].zero_()
    got, tensors = problem.solve("grouped"), problem.tensors
    torch.testing.assert_close(
        got["y"], torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    )
    if needs:
        torch.testing.assert_close(got["x"], problem.upstream @ tensors["weight"])
