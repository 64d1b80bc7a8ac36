"""The kernels on a GPU against the formula in float64: shapes, gates, strides, masks, dtypes.

    pytest -m gpu tests/gated_experts

The first run compiles some two hundred kernels, which takes minutes; Triton keeps them in its cache.  Under
NVIDIA's compute-sanitizer, where the caching allocator would hide reads and writes past the end of a tensor:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck pytest -m gpu tests/gated_experts -k "exact and triton"
    compute-sanitizer --tool racecheck pytest -m gpu tests/gated_experts -k "exact and triton and ragged"
    compute-sanitizer --tool initcheck pytest -m gpu tests/gated_experts -k "exact and triton and ragged"
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from gpu_cases import ARITHMETIC, BACKENDS, DEVICE, GATES, RAGGED, SHAPES, check, distance, make
from torch import nn

from mingle.functional import LayerTensors, gated_experts, gated_experts_shared

pytestmark = pytest.mark.gpu

# TF32 and fp16 run the same code as fp32 and bf16 but for the instruction: three shapes are enough
CASES = [
    *product(SHAPES, ("float32", "bfloat16")),
    *product(("ViT-B/16, four images", "one image", "ragged"), ("tf32", "float16")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "arithmetic"), CASES, indirect=["arithmetic"])
def test_exact_for_every_shape(shape, arithmetic, backend):
    check(make(SHAPES[shape], arithmetic.dtype, "sample"), backend, arithmetic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC, indirect=True)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_exact_for_ragged_sizes_and_gates_of_any_kind(arithmetic, gates, masked, backend):
    check(make(RAGGED, arithmetic.dtype, gates, masked=masked), backend, arithmetic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
def test_exact_for_gates_of_fp32_beside_bf16(gates, backend):
    arithmetic = ARITHMETIC["bfloat16"]
    check(make(RAGGED, torch.bfloat16, gates, gate_dtype=torch.float32), backend, arithmetic)
    check(
        make(
            SHAPES["one image"], torch.bfloat16, gates, gate_dtype=torch.float32, needs={"x", "gate_weight"}
        ),
        backend,
        arithmetic,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC, indirect=True)
@pytest.mark.parametrize("gates", ["token", "sample", "batch"])
def test_exact_without_the_base(arithmetic, gates, backend):
    """Beside W₀ x a dropped expert can hide in the limit of bfloat16."""
    check(make(RAGGED, arithmetic.dtype, gates, base=False), backend, arithmetic)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("gates", ["given token", "given sample", "given batch"])
@pytest.mark.parametrize("experts", [3, 32, 33, 64])
@pytest.mark.parametrize("needs", [set(), {"x"}], ids=["nothing", "x"])
def test_exact_for_ragged_sizes_and_gates_that_are_mostly_zero(arithmetic, gates, experts, needs, backend):
    """Samples of 37 tokens straddle the tiles; gates are read as the bits of words of 32."""
    check(
        make(RAGGED._replace(experts=experts), arithmetic.dtype, gates, zeros=True, needs=needs),
        backend,
        arithmetic,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "guarded", "expanded"])
@pytest.mark.parametrize("name", ["x", "upstream", "weight", "A", "B", "gate_weight"])
def test_exact_for_ragged_sizes_and_strides(name, layout, backend):
    check(make(RAGGED, torch.float32, "sample", layouts={name: layout}), backend, ARITHMETIC["float32"])


def test_exact_for_the_gradient_of_a_plain_sum():
    """Its dy has no stride but 0."""
    problem = make(RAGGED, torch.float32, "sample")
    ones = torch.ones((), device=DEVICE).expand(problem.upstream.shape)
    check(problem._replace(upstream=ones), "triton", ARITHMETIC["float32"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("gates", ["token", "sample", "batch"])
@pytest.mark.parametrize("shape", ["ViT-B/16, four images", "ragged"])
def test_errors_are_like_those_of_the_formula_in_the_same_dtype(shape, arithmetic, gates, backend):
    """Twice as large at most, in fp32 four times, where the library sums long products in pieces; not for
    TF32, whose rounding of the operands libraries do in different ways.
    """
    problem = make(SHAPES[shape], arithmetic.dtype, gates)
    exact, eager, got = problem.exact(), problem.solve("eager"), problem.solve(backend)
    for name in ("y", "x", "weight", "bias", "A", "B"):  # thousands of elements: no luck in the ratio
        times = 4 if arithmetic.dtype == torch.float32 else 2
        assert distance(got[name], exact[name]) <= times * distance(eager[name], exact[name]), name


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_no_tokens(shape, reduce, backend):
    problem = make(RAGGED._replace(leading=shape), torch.float32, reduce)
    got = problem.solve(backend)
    assert got["y"].shape == (*shape, RAGGED.d_out)
    assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_no_experts_are_bitwise_the_base(backend):
    problem = make(RAGGED._replace(experts=0), torch.bfloat16, "sample", needs=set())
    tensors = problem.tensors
    assert torch.equal(
        problem.solve(backend)["y"], nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_tokens_that_are_not_finite_stay_where_they_are(backend):
    problem = make(RAGGED, torch.float32, "sample", masked=True, needs=set())
    mask = problem.options["mask"]
    clean = problem.solve(backend)["y"]
    problem.tensors["x"][~mask] = math.nan
    assert torch.equal(problem.solve(backend)["y"][mask], clean[mask])

    problem = make(RAGGED, torch.float32, "token", needs={"x"})
    clean = problem.solve(backend)
    problem.tensors["x"][1, 2] = math.nan
    got = problem.solve(backend)
    others = torch.ones(RAGGED.leading, dtype=torch.bool, device=DEVICE)
    others[1, 2] = False
    assert all(torch.equal(got[name][others], clean[name][others]) for name in ("y", "x"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
def test_padding_that_is_not_finite_reaches_no_gradient(gates, backend):
    problem = make(RAGGED, torch.float32, gates, masked=True)
    padding = ~problem.options["mask"]
    problem.upstream[padding] = 0
    problem.tensors["x"][padding] = 0
    clean = problem.solve(backend)
    problem.tensors["x"][padding] = math.nan
    assert all(torch.equal(value, clean[name]) for name, value in problem.solve(backend).items())


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("reduce", ["token", "sample"])
def test_layers_that_share_their_input_give_what_each_alone_gives(reduce, backend):
    problems = [
        make(
            RAGGED._replace(experts=experts), torch.float32, reduce, needs={"x", "gate_weight"}, seed=experts
        )
        for experts in (2, 5)
    ]
    x = problems[0].tensors["x"].requires_grad_()
    layers = [
        LayerTensors(
            *(problem.tensors[name].requires_grad_(name == "gate_weight") for name in LayerTensors._fields)
        )
        for problem in problems
    ]
    leaves = [x, *(layer.gate_weight for layer in layers)]
    alone = [gated_experts(x, *layer, reduce=reduce, backend="eager") for layer in layers]
    shared = gated_experts_shared(x, layers, reduce=reduce, backend=backend)
    gradients = [
        torch.autograd.grad(ys, leaves, [problem.upstream for problem in problems]) for ys in (shared, alone)
    ]
    for got, expected in zip((*shared, *gradients[0]), (*alone, *gradients[1]), strict=True):
        assert distance(got, expected) <= 4e-6 * expected.norm()
