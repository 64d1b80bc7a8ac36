"""The Triton kernels against the float64 formula, in the interpreter."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import torch
from drawn_layers import SharedProblem, shared_problems, strides_do_not_matter
from drawn_problems import is_the_formula, problems
from guarded_launches import LAUNCHES, guard_bands
from hypothesis import Phase, settings
from hypothesis import given as drawn
from kernel_checks import (
    COMPACT,
    DTYPES,
    REDUCTIONS,
    accurate,
    dtypes,
    given,
    problem,
    random_mask,
    reductions,
    run,
)
from layouts import Layout, dense
from problems import Problem
from torch import Tensor
from triton.runtime import interpreter

from mingle import ops
from mingle.functional import LayerTensors, gated_experts_shared
from mingle.kernels.gated_experts import fold
from mingle.kernels.gated_experts import triton as gated_experts
from mingle.ops import dispatch

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("name", LAUNCHES)
def test_nan_guard_bands_around_every_tensor_stay_whole_at_widths_that_fill_no_block(name: str) -> None:
    guard_bands(name)


@pytest.mark.parametrize("name", [name for name in COMPACT if not name.startswith("guard bands")])
def test_the_kernels_pass_the_checks_that_mutants_fail(name: str) -> None:
    COMPACT[name]()


@dtypes
@reductions
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_output_and_every_gradient_match_the_formula(dtype: torch.dtype, reduce: str, masked: bool) -> None:
    p = problem((3, 6), experts=5, rank=17, dtype=dtype)
    accurate(p, reduce=reduce, mask=random_mask(3, 6) if masked else None)


@dtypes
@reductions
def test_experts_are_right_without_a_base_to_hide_behind(dtype: torch.dtype, reduce: str) -> None:
    # With W₀ in the sum a missing expert can stay below the limit of half precision.
    accurate(problem((2, 5), d_in=16, d_out=70, dtype=dtype, base=False), reduce=reduce)


@dtypes
@pytest.mark.parametrize(
    ("experts", "rank", "reduce"),
    [
        (1, 1, "token"), (1, 64, "sample"), (1, 17, "batch"), (5, 3, "token"), (5, 17, "sample"),
        (5, 64, "token"), (33, 3, "sample"), (33, 1, "batch"), (64, 1, "token"), (64, 17, "sample"),
    ],
)  # fmt: skip
def test_any_number_of_experts_of_any_rank(dtype: torch.dtype, experts: int, rank: int, reduce: str) -> None:
    accurate(problem((2, 2), d_in=20, d_out=24, experts=experts, rank=rank, dtype=dtype), reduce=reduce)


@pytest.mark.parametrize("rank", [0, 1, 3, 17])
@reductions
def test_ranks_of_1_3_and_17_are_the_formulas(rank: int, reduce: str) -> None:
    accurate(problem((2, 5), rank=rank), reduce=reduce)


@pytest.mark.parametrize("reduce", ["token", "batch"])  # low-rank, and folded
def test_fp16_sums_accumulate_in_fp32(reduce: str) -> None:
    p = {name: torch.zeros_like(value) for name, value in problem((2, 9), 2112, 17, 1, 1).items()}
    p |= dict(x=torch.ones(2, 9, 2112), A=torch.ones(1, 1, 2112), B=torch.ones(1, 17, 1))
    p |= dict(weight=torch.ones(17, 2112), gate_bias=torch.ones(1))
    y = run({name: value.half() for name, value in p.items()}, "triton", None, (), reduce=reduce)["y"]
    assert torch.equal(y, torch.full((2, 9, 17), 4224, dtype=torch.float16))  # in fp16 ones add up to 2048


@dtypes
@pytest.mark.parametrize("reduce", ["token", "sample"])
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (1, 35), (35, 1), (31, 65)])
def test_widths_need_not_fill_a_block(dtype: torch.dtype, reduce: str, d_in: int, d_out: int) -> None:
    accurate(problem((2, 5), d_in, d_out, dtype=dtype), reduce=reduce)


@dtypes
@reductions
@pytest.mark.parametrize("shape", [(1, 1), (1,), (4, 1)], ids=str)
def test_single_tokens(dtype: torch.dtype, reduce: str, shape: tuple[int, ...]) -> None:
    accurate(problem(shape, dtype=dtype), reduce=reduce)


@pytest.mark.parametrize("reduce", [pytest.param("token", marks=pytest.mark.slow), "sample", "batch"])
def test_more_rows_of_tiles_than_one_band_of_programs(reduce: str) -> None:
    accurate(problem((5, 29), d_in=24, d_out=40, experts=2, rank=3), reduce=reduce)


@dtypes
@reductions
def test_padding_that_is_not_finite_reaches_no_gradient(dtype: torch.dtype, reduce: str) -> None:
    p, mask = problem((3, 6), dtype=dtype), random_mask(3, 6)
    x, dy = p["x"], torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert x is not None
    dy[~mask] = 0
    x[~mask] = 0
    expected = run(p, "triton", dy, reduce=reduce, mask=mask)
    x[~mask] = math.nan
    for name, result in run(p, "triton", dy, reduce=reduce, mask=mask).items():
        assert torch.equal(result, expected[name]), name


@dtypes
@reductions
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_zero_tokens_give_an_empty_output_and_zero_gradients(
    dtype: torch.dtype, reduce: str, shape: tuple[int, ...]
) -> None:
    p = problem(shape, dtype=dtype)
    results = run(p, "triton", None, reduce=reduce)
    assert results["y"].shape == (*shape, 20)
    assert results["x"].shape == (*shape, 33)
    assert all(
        (results[name] == 0).all() for name in ("weight", "bias", "A", "B", "gate_weight", "gate_bias")
    )


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, 21)], ids=str)
def test_a_summed_output_sends_back_a_gradient_with_strides_of_zero(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for reduce in REDUCTIONS:
        accurate(problem(shape, dtype=dtype), dy=None, reduce=reduce)


# shrinking a failure would take minutes in the interpreter
drawing = settings(phases=[Phase.generate], deadline=None, derandomize=True, database=None)


@settings(drawing, max_examples=30)
@drawn(problems(DTYPES, widest=40))
def test_strides_and_shapes_of_every_argument_do_not_matter(problem: Problem) -> None:
    is_the_formula(problem, "triton")


@pytest.mark.slow
@settings(drawing, max_examples=200)
@drawn(problems(DTYPES, widest=40))
def test_strides_and_shapes_of_many_more_arguments_do_not_matter(problem: Problem) -> None:
    is_the_formula(problem, "triton")


@settings(drawing, max_examples=5)
@drawn(shared_problems(torch.float32))
def test_strides_of_layers_that_share_their_input_do_not_matter(problem: SharedProblem) -> None:
    strides_do_not_matter(problem, "triton")


MASKS = {
    "expanded": torch.tensor([[True, *[False] * 5]])[:, :1].expand(1, 6),
    "every other": torch.tensor([[True, False, True, True, False, True] * 2])[:, ::2],
    "columns first": torch.tensor([[True, True], [False, True], [True, False]]).mT,
}


@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("layout", MASKS)
def test_a_mask_may_be_expanded_sliced_or_transposed(reduce: str, layout: str) -> None:
    strided = MASKS[layout]
    p = problem(tuple(strided.shape))
    expected = run(p, "triton", None, reduce=reduce, mask=strided.contiguous())
    for name, got in run(p, "triton", None, reduce=reduce, mask=strided).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize(
    "lies", [Layout(expanded=frozenset({-1})), Layout((-4, -3, -1, -2), (1, 1, 2, 2), 3)]
)
@pytest.mark.parametrize("skip", [False, True])
def test_the_backward_operator_takes_what_was_saved_with_any_strides(lies: Layout, skip: bool) -> None:
    p = problem((6,))
    mask = torch.tensor([True, False, True, True, False, True])
    dy, hidden, z = torch.randn(6, 20), torch.randn(6, 12), torch.randn(2, 3)
    gates = [None, None] if skip else [p["gate_weight"], mask]  # only given gates are skipped
    tensors = [dy, p["weight"], p["A"], p["B"], *gates, hidden, z]
    strided = [None if tensor is None else lies.of(tensor) for tensor in tensors]
    plain = [None if tensor is None else dense(tensor) for tensor in strided]
    got, expected = (
        ops.gated_experts_backward(*saved, 3, 0, True, True, skip, "triton") for saved in (strided, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("reduce", ["token", "sample"])
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("need_x", [False, True], ids=["gates", "gates and x"])
def test_layers_that_share_a_shrink_are_each_right(
    reduce: str, masked: bool, frozen: int, need_x: bool
) -> None:
    problems = [
        problem((3, 6), d_out=outputs, experts=experts, seed=seed)
        for seed, (outputs, experts) in enumerate([(20, 3), (35, 2)])
    ]
    mask = random_mask(3, 6) if masked else None

    def together(backend: str, dtype: torch.dtype) -> list[Tensor]:
        x = problems[0]["x"].detach().to(dtype).requires_grad_(need_x)
        layers = [
            LayerTensors(*(p[name].clone().to(dtype) for name in LayerTensors._fields)) for p in problems
        ]
        for layer in layers:
            layer.gate_weight.requires_grad_()
            layer.gate_bias.requires_grad_()
        options = dict(reduce=reduce, mask=mask, frozen_gates=[frozen] * 2, backend=backend)
        ys = gated_experts_shared(x, layers, **options)
        sum(y.square().sum() for y in ys).backward()
        gates = [gate.grad[frozen:] for layer in layers for gate in (layer.gate_weight, layer.gate_bias)]
        return [*(y.detach() for y in ys), *gates, *([x.grad] if need_x else [])]

    for result, exact in zip(
        together("triton", torch.float32), together("eager", torch.float64), strict=True
    ):
        assert (result - exact).norm() <= 1e-5 * exact.norm()


@reductions
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_gates_may_be_fp32_where_the_layer_is_fp16(reduce: str, masked: bool) -> None:
    p = problem((3, 6), dtype=torch.float16, gate_dtype=torch.float32)
    accurate(p, reduce=reduce, mask=random_mask(3, 6) if masked else None)


@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
# two samples of these tokens: 33 inputs to 20 outputs fold from 12.5 tokens on
@pytest.mark.parametrize(("tokens", "folds"), [(6, False), (7, True)])
@pytest.mark.parametrize(("experts", "rank"), [(1, 3), (5, 17)], ids=["dz by tokens", "dz by weights"])
def test_one_gate_for_the_whole_batch_folds_where_that_pays(
    dtype, masked, tokens, folds, experts, rank
) -> None:
    p = problem((2, tokens), experts=experts, rank=rank, dtype=dtype)
    with mock.patch.object(fold, "fold", wraps=fold.fold) as folding:
        accurate(p, reduce="batch", mask=random_mask(2, tokens) if masked else None)
    assert folding.call_count == folds


@dtypes
@pytest.mark.parametrize("needs", [("x",), ("x", "A", "B", "gates")], ids=["constant", "trained"])
def test_given_gates_for_the_whole_batch_fold_too(dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    with mock.patch.object(fold, "fold", wraps=fold.fold) as folding:
        accurate(given(problem((3, 7), dtype=dtype), torch.tensor([0.5, 0.0, -1.5])), needs=needs)
    assert folding.call_count == 1


def test_folding_leaves_the_base_weight_as_it_is() -> None:
    p = problem((3, 7))
    before = p["weight"].clone()
    run(p, "triton", None, reduce="batch")
    assert torch.equal(p["weight"], before)


def test_rows_may_be_further_apart_than_32_bits_count(tmp_path: Path) -> None:
    # x lies in a sparse file, which takes no memory and next to no disk; 2³¹ + 64 elements of fp16.
    stride = 2**30 + 32
    try:
        buffer = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 64, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no sparse file: {error}")
    p = problem((1, 3), dtype=torch.float16)
    near = p["x"]
    far = buffer.as_strided(near.shape, (0, stride, 1))
    far.copy_(near)
    # The interpreter copies arguments back from where they were computed, here onto themselves: the whole
    # file.
    with mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", autospec=True):
        got = _every_launch(far[0], p)
    assert all(torch.equal(one, right) for one, right in zip(got, _every_launch(near[0], p), strict=True))


def _every_launch(x: Tensor, p: dict[str, Tensor]) -> list[Tensor]:
    z, _ = gated_experts.gates(x, p["gate_weight"], p["gate_bias"], None, 1)
    of_samples, _ = gated_experts.gates(x, p["gate_weight"], p["gate_bias"], None, len(x))
    hidden, gated = gated_experts.shrink(x, p["A"], z, 1, None)
    y = gated_experts.expand(x, p["weight"], p["bias"], hidden, gated, p["B"].mT, z, 1, None)
    u, dz = gated_experts.upstream(x, p["A"].mT, hidden, z, 1, None)
    return [z, of_samples, hidden, gated, y, u, dz]


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("name", ["weight", "A", "B", "gate_weight"])
def test_factors_may_span_more_than_two_to_the_thirty_one_elements(
    name: str, dim: int, tmp_path: Path
) -> None:
    p = problem((2, 7), dtype=torch.float16)
    near = p[name]
    inner = near.shape[-3 - dim]
    apart = 2**31 // (near.shape[dim] - 1) + len(near) * inner
    strides = [inner] * (near.dim() - 2) + ([apart, 1] if dim == -2 else [1, apart])
    try:
        storage = torch.from_file(str(tmp_path / "far"), shared=True, size=2**32, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no sparse file: {error}")
    (tmp_path / "far").unlink()  # stays mapped; its size would count in listings and quotas
    far = storage.as_strided(near.shape, strides).copy_(near)
    with mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", autospec=True):
        for reduce in ("sample", "batch"):  # which folds
            got, expected = (run(q, "triton", None, ("x",), reduce=reduce) for q in (p | {name: far}, p))
            assert all(torch.equal(got[key], expected[key]) for key in expected)


@dtypes
@reductions
def test_equal_inputs_give_equal_bits(dtype: torch.dtype, reduce: str) -> None:
    p = problem(dtype=dtype)
    dy = torch.randn(2, 5, 20).to(dtype)
    first = run(p, "triton", dy, reduce=reduce)
    for _ in range(5):
        again = run(
            {name: None if value is None else value.clone() for name, value in p.items()},
            "triton",
            dy.clone(),
            reduce=reduce,
        )
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_bfloat16_is_refused_by_the_interpreter_with_the_reason() -> None:
    assert "interpreter" in str(dispatch.without_triton(torch.device("cpu"), torch.bfloat16))
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16"):
        run(problem(dtype=torch.bfloat16), "triton", None)
