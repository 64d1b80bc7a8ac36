"""What the Triton kernels leave out: zero gates, frozen gates, unwanted gradients, NaN of other tokens."""

from __future__ import annotations

import math
from unittest import mock

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import torch
from kernel_checks import (
    accurate,
    dtypes,
    given,
    one_hot,
    problem,
    random_mask,
    reductions,
    run,
    sorted_tokens,
    top_k,
)

from mingle.kernels.gated_experts import listed

pytestmark = pytest.mark.interpret


GATES = {
    "all tokens": (5,),
    "each sample": (2, 5),
    "each token": (2, 9, 5),
}


@dtypes
@pytest.mark.parametrize("rows", GATES)
def test_given_gates_get_their_gradient_and_so_do_zeros(dtype: torch.dtype, rows: str) -> None:
    gates = torch.randn(GATES[rows], generator=torch.Generator().manual_seed(5))
    gates = torch.where(gates.abs() < 0.5, 0.0, gates)
    assert (gates == 0).any()
    accurate(given(problem((2, 9), experts=5, dtype=dtype), gates))


@dtypes
@pytest.mark.parametrize("rows", GATES)
@pytest.mark.parametrize("needs", [(), ("x",), ("x", "weight", "bias")], ids=["forward", "x", "base"])
def test_constant_gates_with_zeros_are_skipped_rightly(
    dtype: torch.dtype, rows: str, needs: tuple[str, ...]
) -> None:
    gates = torch.randn(GATES[rows], generator=torch.Generator().manual_seed(6))
    accurate(given(problem((2, 9), experts=5, dtype=dtype), torch.where(gates < 0, 0.0, gates)), needs=needs)


@dtypes
@pytest.mark.parametrize(
    ("shape", "needs"),
    [((40, 1), ("x",)), ((8, 5), ("x",)), ((2, 23), ("x",)), ((8, 5), ("x", "gates"))],
    ids=["40 samples", "8 samples", "2 samples", "trained"],
)
@pytest.mark.parametrize("of", ["samples", "tokens"])
def test_one_expert_of_forty_crosses_the_word_of_gate_bits(dtype, shape, needs, of) -> None:
    gates = one_hot(shape[0], 40) if of == "samples" else one_hot(math.prod(shape), 40).view(*shape, 40)
    accurate(given(problem(shape, d_in=16, d_out=24, experts=40, rank=2, dtype=dtype), gates), needs=needs)


@dtypes
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rows", [(3, 21), (3, 1), (3,)], ids=["tokens", "one row a sample", "samples"])
@pytest.mark.parametrize("experts", [3, 140], ids=["3 experts", "140 experts"])
def test_sorted_tokens_give_the_same(dtype, k, rows, experts) -> None:
    sorted_tokens(
        given(problem((3, 21), d_in=16, experts=experts, rank=2, dtype=dtype), top_k(rows, experts, k))
    )


def test_tokens_without_any_expert_are_sorted_too() -> None:
    gates = top_k((2, 9), 5, 1) * (torch.arange(18) % 3 > 0).view(2, 9, 1)
    sorted_tokens(given(problem((2, 9), experts=5), gates))


@pytest.mark.parametrize("group", [1, 3])
def test_groups_are_sorted_by_their_first_two_experts_and_keep_their_order_otherwise(group: int) -> None:
    z = top_k((40,), 150, 2)
    z[7] = 0
    x = torch.zeros(40 * group, 4)
    with mock.patch.object(listed, "sorting_pays", return_value=True):
        active = listed.active(x, 150, 4, z, group)
    experts = [row.nonzero().flatten().tolist() or [150, 150] for row in z]
    assert active.order is not None
    assert active.order.tolist() == sorted(range(40), key=lambda row: (experts[row], row))
    positions = active.order.long().repeat_interleave(group)
    for tile, row in enumerate(active.listed):
        own = z[positions[tile * active.rows : (tile + 1) * active.rows]].any(0).nonzero().flatten()
        assert row[: row[-1]].tolist() == own.tolist()


def test_what_is_passed_over_is_listed_once_for_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, plain = [], listed.list_kernel
    spy = {(2,): lambda *values, **options: (lists.append(1), plain[(2,)](*values, **options))}
    monkeypatch.setattr(listed, "list_kernel", spy)
    run(given(problem((2, 9), experts=5), top_k((2,), 5, 1)), "triton", None, needs=("x",))
    assert len(lists) == 2  # forward and backward


@pytest.mark.parametrize("expert", [0, 31, 32, 39])
def test_experts_with_gates_of_zero_are_not_even_read(expert: int) -> None:
    p = given(
        problem((3, 5), experts=40, rank=2), torch.zeros(3, 40).index_fill(1, torch.tensor(expert), 0.5)
    )
    right = run(p, "eager", None, needs=("x",))
    for name in ("A", "B"):
        others = torch.arange(40) != expert
        p[name] = torch.where(others.view(-1, 1, 1), math.nan, p[name])
    for name, value in run(p, "triton", None, needs=("x",)).items():
        torch.testing.assert_close(value, right[name])


def test_gates_that_are_all_zero_leave_the_base() -> None:
    p = given(problem(), torch.zeros(2, 3))
    base = torch.nn.functional.linear(p["x"], p["weight"], p["bias"])
    torch.testing.assert_close(run(p, "triton", None, needs=())["y"], base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", ["all tokens", "each sample", "each token"])
def test_gates_may_be_expanded_or_in_half_precision(rows: str) -> None:
    gates = torch.rand(5, generator=torch.Generator().manual_seed(7)).expand(GATES[rows])
    accurate(given(problem((2, 9), experts=5), gates), needs=("x", "A"))
    accurate(given(problem((2, 9), experts=5, dtype=torch.float16), gates.half()))


@reductions
@pytest.mark.parametrize("shape", [(2, 5), (3, 7)], ids=["low-rank", "folded batch"])
@pytest.mark.parametrize("frozen", [1, 3, 4])
@pytest.mark.parametrize(
    "needs", [("gate_weight", "gate_bias"), ("x", "gate_weight", "gate_bias")], ids=["gates", "gates and x"]
)
def test_the_first_gates_may_be_frozen(
    reduce: str, shape: tuple[int, ...], frozen: int, needs: tuple[str, ...]
) -> None:
    p = problem(shape, experts=4)
    right = run(p, "triton", None, reduce=reduce)
    for name, value in run(p, "triton", None, needs, reduce=reduce, frozen_gates=frozen).items():
        if name.startswith("gate_"):
            assert (value[:frozen] == 0).all()
            value, right[name] = value[frozen:], right[name][frozen:]
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-5)


@dtypes
@reductions
@pytest.mark.parametrize(
    "needs", [("gate_weight", "gate_bias"), ("x",), ("A",), ("B",), ("weight", "bias")], ids="+".join
)
def test_only_the_wanted_gradients_are_computed_and_right(
    dtype: torch.dtype, reduce: str, needs: tuple[str, ...]
) -> None:
    accurate(problem(dtype=dtype), needs=needs, reduce=reduce)


def test_nan_in_one_token_stays_in_that_token() -> None:
    p = problem((2, 9))
    for backward in (False, True):
        dy = torch.ones(2, 9, 20)
        p["x"][1, 4] = 0.0 if backward else math.nan
        dy[1, 4] = math.nan if backward else 1.0
        results = run(p, "triton", dy, needs=("x",), reduce="token")
        affected = torch.zeros(2, 9, dtype=torch.bool).index_put(
            (torch.tensor(1), torch.tensor(4)), torch.tensor(True)
        )
        for name in ("x",) if backward else ("y", "x"):
            assert torch.equal(results[name].isnan().any(-1), affected), name


def test_nan_in_one_sample_stays_in_that_sample() -> None:
    p = problem((3, 6))
    p["x"][1, 4] = math.nan
    results = run(p, "triton", None, needs=("x",), reduce="sample")
    assert results["y"].isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert results["x"].isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("tokens", [4, 12], ids=["low-rank", "folded"])
def test_padding_may_hold_nan(reduce: str, tokens: int) -> None:
    p, mask = problem((3, tokens)), random_mask(3, tokens)
    right = run(p, "triton", None, needs=(), reduce=reduce, mask=mask)["y"]
    p["x"][~mask] = math.nan
    got = run(p, "triton", None, needs=(), reduce=reduce, mask=mask)["y"]
    assert torch.equal(got[mask], right[mask])
