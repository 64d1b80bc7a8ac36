"""The grouped backend against the formula in float64: random shapes, strides, dtypes, masks and gates,
forward and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from drawn_layers import shared_problems, strides_do_not_matter
from drawn_problems import GATES, LIMITS, is_the_formula, make, problems
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mingle.functional import LayerTensors, gated_experts, gated_experts_shared
from mingle.kernels import gemm
from mingle.kernels.gated_experts import grouped


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["auto", "grouped", "eager"]))
def test_outputs_and_gradients_are_the_formulas_whatever_the_strides(problem, backend):
    is_the_formula(problem, backend)


@pytest.mark.parametrize("dtype", [dtype for dtype in LIMITS if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masked", [False, True])
def test_errors_are_within_the_limits_and_twice_those_of_the_formula_in_the_same_dtype(dtype, gates, masked):
    """The ratio counts over several problems and many independent sums: that of two single rounding errors
    says nothing.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(6):
        problem = make((4, 25), 48, 40, 5, 8, dtype, gates, masked=masked, seed=seed)
        exact, eager, got = problem.exact(), problem.solve("eager"), problem.solve("grouped")
        for name, value in exact.items():
            own, other = (
                float((result[name].double() - value).norm() / value.norm()) for result in (got, eager)
            )
            assert own <= LIMITS[dtype], name
            if value.numel() >= 40 and (gates.endswith("token") or not name.startswith("gate")):
                errors.setdefault(name, []).append((own, other))
    assert {"y", "x", "weight", "bias", "A", "B"} <= errors.keys()
    for name, pairs in errors.items():
        own, other = (math.hypot(*column) for column in zip(*pairs, strict=True))
        assert own <= 2 * other, name


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_experts_alone_are_as_exact_as_with_the_base(dtype, gates):
    """Beside W₀ x a dropped expert can hide in the limit of bfloat16."""
    problem = make((4, 25), 48, 40, 9, 8, dtype, gates)
    problem.tensors["weight"].zero_()
    problem.tensors["bias"].zero_()
    exact, got = problem.exact(), problem.solve("grouped")
    for name, value in exact.items():
        assert (got[name].double() - value).norm() <= LIMITS[dtype] * value.norm(), name


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("leading", "experts", "rank"),
    [((2, 3), 3, 2), ((1, 2), 2, 1), ((1, 8), 3, 3), ((4, 2), 1, 1), ((2,), 2, 2), ((2, 1, 3), 2, 2)],
    ids=["samples", "few tokens", "many tokens", "one rank", "matrix", "four dimensions"],
)
def test_gradcheck(gates, masked, leading, experts, rank):
    """With d_in = 5 and d_out = 4, gates that all tokens share fold from three tokens on; both ways to their
    gradient are taken.
    """
    problem = make(
        leading, 5, 4, experts, rank, torch.float64, gates, masked=masked, layouts=dict(B="transposed")
    )
    names = list(problem.tensors)

    def call(*values: Tensor) -> Tensor:
        return gated_experts(
            **({"gate_weight": None, "gate_bias": None} | dict(zip(names, values, strict=True))),
            **problem.options,
            backend="grouped",
        )

    torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in problem.tensors.values()])


@pytest.mark.parametrize("gates", ["token", "sample", "batch", "given sample"])
@pytest.mark.parametrize("frozen", [0, 1, 3, 4])
@pytest.mark.parametrize("needs", [None, {"gate_weight", "gate_bias", "gates"}], ids=["all", "gates"])
def test_frozen_gates_get_exactly_nothing_and_the_others_what_they_would(gates, frozen, needs):
    free = make((3, 4), 7, 6, 4, 3, torch.float64, gates, needs=needs).solve("grouped")
    some = make((3, 4), 7, 6, 4, 3, torch.float64, gates, needs=needs, frozen=frozen).solve("grouped")
    for name, value in some.items():
        dim = {"gate_weight": 0, "gate_bias": 0, "gates": -1}.get(name)
        if dim is not None:
            assert not value.narrow(dim, 0, frozen).any(), name
            value, free[name] = (tensor.narrow(dim, frozen, 4 - frozen) for tensor in (value, free[name]))
        torch.testing.assert_close(value, free[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
@pytest.mark.parametrize("frozen", [(0, 0), (1, 2), (3, 0), (3, 2)])
@pytest.mark.parametrize(
    "needs",
    [{"x"}, {"gate_weight", "gate_bias"}, {"x", "gate_weight", "gate_bias"}],
    ids=["x", "gates", "both"],
)
def test_layers_that_share_their_input_give_what_each_alone_gives(reduce, frozen, needs):
    problems = [
        make(
            (3, 2),
            16,
            d_out,
            experts,
            2,
            torch.float64,
            reduce,
            masked=True,
            frozen=old,
            needs=needs,
            seed=seed,
        )
        for seed, (d_out, experts, old) in enumerate(zip((14, 15), (3, 2), frozen, strict=True))
    ]
    x, mask = problems[0].tensors["x"].requires_grad_("x" in needs), problems[0].options["mask"]
    layers = [
        LayerTensors(*(problem.tensors[name].requires_grad_(name in needs) for name in LayerTensors._fields))
        for problem in problems
    ]
    gates = [gate for layer in layers for gate in (layer.gate_weight, layer.gate_bias)]
    leaves = [tensor for tensor in (x, *gates) if tensor.requires_grad]
    alone = [
        gated_experts(x, *layer, reduce=reduce, mask=mask, frozen_gates=old)
        for layer, old in zip(layers, frozen, strict=True)
    ]
    shared = gated_experts_shared(x, layers, reduce=reduce, mask=mask, frozen_gates=frozen)
    torch.testing.assert_close(shared, alone, rtol=1e-12, atol=1e-12)
    upstream = [problem.upstream for problem in problems]
    expected, got = (torch.autograd.grad(ys, leaves, upstream) for ys in (alone, shared))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(shared_problems(torch.float64), st.sampled_from(["auto", "grouped", "eager"]))
def test_strides_of_layers_that_share_their_input_do_not_matter(problem, backend):
    strides_do_not_matter(problem, backend)


@pytest.mark.parametrize("library", gemm.LIBRARIES)
@pytest.mark.parametrize("gates", ["token", "sample", "batch", "given token"])
def test_rows_lie_beyond_two_to_the_thirty_one_elements(library, gates, tmp_path, monkeypatch):
    """Few rows, 2³⁰ elements apart, in a sparse file: nothing but their own pages is ever read or written."""
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    stride, (samples, tokens) = 1 << 30, (2, 2)

    def far_apart(name: str, values: Tensor) -> Tensor:
        path, size = tmp_path / name, stride * (samples * tokens - 1) + values.shape[-1]
        try:
            with path.open("wb") as file:
                file.truncate(values.element_size() * size)
            if path.stat().st_blocks * 512 > 1 << 20:
                pytest.skip("the file system has no sparse files")
            storage = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
            path.unlink()  # stays mapped; its size would count in listings and quotas
        except (OSError, RuntimeError) as error:
            pytest.skip(f"no sparse file of this size: {error}")
        view = storage.as_strided(values.shape, (tokens * stride, stride, 1))
        assert view[-1, -1].data_ptr() - view.data_ptr() > values.element_size() << 31
        return view.copy_(values)

    near = make(
        (samples, tokens), 24, 20, 3, 4, torch.float32, gates, needs={"x", "gate_weight", "gate_bias"}
    )
    far = near._replace(
        tensors=near.tensors | dict(x=far_apart("x", near.tensors["x"])),
        upstream=far_apart("dy", near.upstream),
    )
    exact, got = near.exact(), far.solve("grouped")
    for name, value in exact.items():
        assert (got[name] - value).norm() <= 2e-6 * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 7, 700])
def test_narrow_experts_are_gated_as_wide_ones(groups, dtype, monkeypatch):
    H, z = torch.randn(700, 5 * 6).to(dtype), torch.randn(groups, 5)
    found = {}
    for many in (1, math.inf):
        monkeypatch.setattr(grouped, "_MANY", many)
        own = H.clone()
        found[many] = grouped.gate(H, z, 700 // groups), grouped.gate(own, z, 700 // groups, out=own), own
    expected = (H.view(groups, -1, 5, 6) * z.to(dtype).view(groups, 1, 5, 1)).view_as(H)
    assert all(torch.equal(one, expected) for each in found.values() for one in each)
