"""The grouped backend against the formula in float64: random shapes, strides, dtypes, masks and gates,
forward and every gradient.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, laid_out
from torch import Tensor

from mingle.functional import LayerTensors, gated_experts, gated_experts_shared
from mingle.kernels import gemm
from mingle.kernels.gated_experts import grouped

# ‖error‖/‖exact‖ that a tensor may have
LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def zeros_in(gates: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Gate rows with exact zeros: none, most of them, or all but one, whose expert comes in order or not."""
    rows = gates.reshape(-1, gates.shape[-1])
    if kind == "many":
        rows = rows * (torch.rand(rows.shape, generator=generator) < 0.2)
    elif kind != "none":
        expert = torch.randint(rows.shape[1], rows.shape[:1], generator=generator)
        expert = expert.sort().values if kind == "sorted" else expert
        rows = rows * torch.nn.functional.one_hot(expert, rows.shape[1]).to(rows.dtype)
    return rows.reshape(gates.shape)


def make(
    leading: tuple[int, ...],
    d_in: int,
    d_out: int,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    gates: str,
    *,
    zeros: str = "none",
    gate_dtype: torch.dtype | None = None,
    masked: bool = False,
    frozen: int = 0,
    layouts: dict[str, str] | None = None,
    needs: set[str] | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose outputs are of order 1.

    Args:
        gates: ``"token"``, ``"sample"`` or ``"batch"``: linear gates so reduced; ``"given …"``: values in
            that shape.
        layouts: by tensor name, ``"upstream"`` included.
        needs: names of the tensors that need gradients; all of them where None.
    """
    generator = torch.Generator().manual_seed(seed)
    layouts = layouts or {}

    def normal(name: str, *shape: int, terms: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(terms)
        return laid_out(values.to(dtype), layouts.get(name, "plain"))

    tensors = dict(
        x=normal("x", *leading, d_in),
        weight=normal("weight", d_out, d_in, terms=d_in),
        bias=normal("bias", d_out),
        A=normal("A", experts, rank, d_in, terms=d_in),
        B=normal("B", experts, d_out, rank, terms=rank),
    )
    options: dict[str, Any] = dict(frozen_gates=frozen)
    if gates.startswith("given"):
        shape = {"batch": (), "sample": leading[:-1], "token": leading}[gates.removeprefix("given ")]
        tensors["gates"] = zeros_in(
            normal("gates", *shape, experts, dtype=gate_dtype or dtype), zeros, generator
        )
    else:
        tensors["gate_weight"] = normal("gate_weight", experts, d_in, terms=d_in, dtype=gate_dtype or dtype)
        tensors["gate_bias"] = normal("gate_bias", experts, dtype=gate_dtype or dtype)
        options["reduce"] = gates
    if masked:
        options["mask"] = torch.rand(leading, generator=generator) < 0.6
    return Problem(
        tensors,
        options,
        [name for name in tensors if needs is None or name in needs],
        normal("upstream", *leading, d_out),
    )


GATES = ("token", "sample", "batch", "given token", "given sample", "given batch")
NEEDS = (
    None,
    set(),
    {"x"},
    {"gate_weight", "gate_bias", "gates"},
    {"x", "gate_weight", "gate_bias", "gates"},
    {"A"},
    {"B", "gate_bias"},
    {"weight", "bias"},
)
LAYOUTS = ("plain", "transposed", "samples last", "sliced", "expanded")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dtype = draw(st.sampled_from(sorted(LIMITS, key=str)))
    experts = draw(st.integers(1, 9))
    return make(
        tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        experts,
        draw(st.integers(1, 6)),
        dtype,
        draw(st.sampled_from(GATES)),
        zeros=draw(st.sampled_from(["none", "many", "sorted", "shuffled"])),
        gate_dtype=draw(st.sampled_from([None, torch.promote_types(dtype, torch.float32)])),
        masked=draw(st.booleans()),
        frozen=draw(st.integers(0, experts)),
        layouts=draw(
            st.dictionaries(
                st.sampled_from(["x", "weight", "bias", "A", "B", "upstream"]), st.sampled_from(LAYOUTS)
            )
        ),
        needs=draw(st.sampled_from(NEEDS)),
        seed=draw(st.integers(0, 1 << 20)),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems(), st.sampled_from(["auto", "grouped"]))
def test_outputs_and_gradients_are_the_formulas(problem, backend):
    exact, sizes, got, dtype = (
        problem.exact(),
        problem.sizes(),
        problem.solve(backend),
        problem.tensors["x"].dtype,
    )
    for name, value in exact.items():
        tensor = problem.tensors.get(name, problem.tensors["x"])
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == value.shape, name
        # a term of dx is rounded four times (u, its gate, their product, the sum so far), each by half an eps
        # at most, and with the few terms of these tensors nothing averages out
        allowed = max(LIMITS[dtype] * float(value.norm()), 2 * torch.finfo(dtype).eps * sizes[name])
        assert (got[name].double() - value).norm() <= allowed, name


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


# ---- algebra


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
def test_a_token_that_is_not_finite_touches_no_other(gates, zeros, bad):
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


# ---- sparse gates


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


# ---- large offsets


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
