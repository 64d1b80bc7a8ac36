"""When a call folds its experts into one matrix: on both sides of every threshold, with equal results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import problem

from mingle.functional import gated_experts
from mingle.ops import dispatch


@pytest.mark.parametrize(
    ("d_in", "d_out", "columns", "device", "most"),
    [
        (768, 768, 512, "cpu", 384),
        (768, 3072, 512, "cpu", 614),
        (3072, 768, 64, "cpu", 614),
        (8, 8, 12, "cpu", 4),
        (768, 3072, 512, "cuda", 2174),
        (768, 768, 1280, "cuda", 774),
    ],
)
def test_folding_pays_beyond_a_number_of_tokens(d_in, d_out, columns, device, most):
    assert not dispatch.folding_pays(most, d_in, d_out, columns, device)
    assert dispatch.folding_pays(most + 1, d_in, d_out, columns, device)


@given(
    st.integers(1, 5000),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.sampled_from(["cpu", "cuda", "mps"]),
)
def test_folding_pays_where_it_takes_fewer_operations(tokens, d_in, d_out, ranks, device):
    """And nowhere else; where memory counts too, not everywhere there."""
    low_rank = tokens * (d_in * d_out + ranks * (d_in + d_out))
    folded = d_in * d_out * (ranks + tokens)
    pays = dispatch.folding_pays(tokens, d_in, d_out, ranks, device)
    assert pays <= (folded < low_rank) if device == "cuda" else pays == (folded < low_rank)


@pytest.mark.parametrize("backend", ["auto", "grouped"])
def test_only_tokens_that_all_share_their_gates_are_folded(backend):
    x = torch.empty(1000, 768)
    for group, fold in ((1000, True), (500, False), (1, False)):
        assert dispatch.plan(backend, x, group, 768, 512) == ("grouped", fold)
    assert dispatch.plan(backend, x[:384], 384, 768, 512) == ("grouped", False)
    assert dispatch.plan(backend, x[:385], 385, 768, 512) == ("grouped", True)
    assert dispatch.plan(backend, x[:0], 1, 768, 512) == ("grouped", False)


@pytest.mark.parametrize("backend", ["auto", "grouped"])
@pytest.mark.parametrize(
    ("leading", "form"), [((2, 2), "LOW_RANK"), ((4,), "LOW_RANK"), ((5,), "FOLDED"), ((2, 3), "FOLDED")]
)
def test_batch_gates_fold_above_the_threshold_and_only_there(backend, leading, form, used):
    p = problem(*leading)
    torch.testing.assert_close(
        gated_experts(**p, reduce="batch", backend=backend),
        gated_experts(**p, reduce="batch", backend="eager"),
        rtol=1e-12,
        atol=1e-12,
    )
    assert used == [f"{form} grouped"]


@pytest.mark.parametrize(
    ("leading", "reduce", "form"),
    [
        ((1, 9), "sample", "FOLDED"),  # one sample is the batch
        ((1, 4), "sample", "LOW_RANK"),
        ((2, 9), "sample", "LOW_RANK"),
        ((9,), "sample", "LOW_RANK"),  # rows of a matrix are samples of one token
        ((1, 9), "token", "LOW_RANK"),
        ((9,), "token", "LOW_RANK"),
    ],
)
def test_other_gates_fold_where_one_row_serves_all(leading, reduce, form, used):
    p = problem(*leading)
    torch.testing.assert_close(
        gated_experts(**p, reduce=reduce),
        gated_experts(**p, reduce=reduce, backend="eager"),
        rtol=1e-12,
        atol=1e-12,
    )
    assert used == [f"{form} grouped"]


@pytest.mark.parametrize(
    ("shape", "leading", "form"),
    [
        ((3,), (3, 4), "FOLDED"),
        ((3,), (4,), "LOW_RANK"),
        ((1, 3), (1, 9), "FOLDED"),
        ((2, 3), (2, 9), "LOW_RANK"),
        ((2, 9, 3), (2, 9), "LOW_RANK"),
    ],
)
def test_given_gates_fold_by_the_same_rule(shape, leading, form, used):
    p = problem(*leading) | dict(
        gate_weight=None, gate_bias=None, gates=torch.randn(*shape, dtype=torch.float64)
    )
    torch.testing.assert_close(
        gated_experts(**p), gated_experts(**p, backend="eager"), rtol=1e-12, atol=1e-12
    )
    assert used == [f"{form} grouped"]


@pytest.mark.parametrize("given_gates", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_give_the_same_result_and_gradients(given_gates, masked, used, monkeypatch):
    p = problem(2, 6)
    mask = torch.arange(12).view(2, 6) % 3 > 0 if masked else None
    if given_gates:
        p = {name: tensor for name, tensor in p.items() if not name.startswith("gate")} | dict(
            gates=torch.randn(3, dtype=torch.float64)
        )
    upstream = torch.randn(2, 6, 8, dtype=torch.float64)
    results = []
    for folds in (True, False):
        monkeypatch.setattr(dispatch, "folding_pays", lambda *_, folds=folds: folds)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        y = gated_experts(**({"gate_weight": None, "gate_bias": None} | leaves), reduce="batch", mask=mask)
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), upstream)])
    assert used == ["FOLDED grouped", "LOW_RANK grouped"]
    for folded, low_rank in zip(*results, strict=True):
        torch.testing.assert_close(folded, low_rank, rtol=1e-11, atol=1e-11)


def test_folding_leaves_the_weight_bitwise_alone(used):
    p = problem(2, 6)
    before = {name: tensor.clone() for name, tensor in p.items()}
    gated_experts(**p, reduce="batch")
    assert used == ["FOLDED grouped"]
    assert all(torch.equal(p[name], before[name]) for name in p)
