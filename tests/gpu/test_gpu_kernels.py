"""The kernels on a GPU: exactness, determinism, CUDA graphs, the compiler, large tensors, and that gates of 0 cost nothing.

    pytest tests/gpu

The first run compiles some two hundred kernels, which takes minutes; Triton keeps them in its cache.  Under NVIDIA's compute-sanitizer,
where the caching allocator would hide reads and writes past the end of a tensor:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck pytest tests/gpu -k "exact and triton"
    compute-sanitizer --tool racecheck pytest tests/gpu -k "exact and triton and ragged"
    compute-sanitizer --tool initcheck pytest tests/gpu -k "exact and triton and ragged"
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mingle
from mingle import dispatch, ops
from mingle.functional import Projection, gated_experts, gated_experts_shared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU")

DEVICE = torch.device("cuda")


class Arithmetic(NamedTuple):
    """What products run in: the tensors' dtype, ‖error‖/‖exact‖ that a result may have, and the size of one rounding."""

    dtype: torch.dtype
    limit: float
    rounding: float


ARITHMETIC = {
    "float32": Arithmetic(torch.float32, 2e-6, 2.0**-23),
    "tf32": Arithmetic(torch.float32, 1.5e-3, 2.0**-10),
    "float16": Arithmetic(torch.float16, 1.5e-3, 2.0**-10),
    "bfloat16": Arithmetic(torch.bfloat16, 1e-2, 2.0**-7),
}
BACKENDS = ("triton", "grouped")
GATES = ("token", "sample", "batch", "given token", "given sample", "given batch")


class Shape(NamedTuple):
    """The sizes of one layer and of its input [*leading, d_in]."""

    leading: tuple[int, ...]
    d_in: int
    d_out: int
    experts: int
    rank: int


RAGGED = Shape((3, 37), 77, 131, 5, 17)
SHAPES = {
    "ViT-B/16, four images": Shape((4, 197), 768, 768, 20, 64),
    "ViT-B/32": Shape((16, 50), 768, 3072, 8, 64),
    "one image": Shape((1, 50), 768, 768, 20, 64),
    "ragged": RAGGED,
    "ranks of one": Shape((2, 33), 100, 60, 5, 1),
    "ranks of three": Shape((2, 33), 64, 96, 6, 3),
    "ranks of two hundred": Shape((2, 40), 160, 136, 2, 200),
    "one expert": Shape((4, 50), 256, 256, 1, 16),
    "sixty-four experts": Shape((7, 20), 128, 80, 64, 3),
    "long samples": Shape((2, 800), 768, 64, 3, 16),  # pooled before the shrink launch
    "many experts": Shape((3, 20), 48, 64, 130, 2),  # so are these
    "matrix": Shape((65,), 96, 64, 4, 8),
    "four dimensions": Shape((2, 2, 9), 96, 64, 4, 8),
}


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    yield
    matmul.fp32_precision = before


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if request.param == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    return ARITHMETIC[request.param]


class Problem(NamedTuple):
    """The arguments of one call: `tensors` by name, those that need gradients, and the gradient of y."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    needs: list[str]
    upstream: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return self._replace(tensors={name: change(tensor) for name, tensor in self.tensors.items()}, upstream=change(self.upstream))

    def solve(self, backend: str) -> dict[str, Tensor]:
        """y and the gradients."""
        leaves = {name: tensor.detach().requires_grad_(name in self.needs) for name, tensor in self.tensors.items()}
        y = gated_experts(**({"gate_weight": None, "gate_bias": None} | leaves), **self.options, backend=backend)
        gradients = torch.autograd.grad(y, [leaves[name] for name in self.needs], self.upstream) if self.needs else ()
        return {"y": y.detach(), **dict(zip(self.needs, gradients, strict=True))}

    def exact(self) -> dict[str, Tensor]:
        return self.mapped(Tensor.double).solve("eager")

    def sizes(self) -> dict[str, float]:
        """The norms of the same sums with all terms counted positive."""
        return {name: float(value.norm()) for name, value in self.mapped(lambda tensor: tensor.double().abs()).solve("eager").items()}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """`tensor` with other strides; whatever lies between its elements is NaN.  Expanded: its first entry throughout."""
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)[..., 1::2]
        return wide.copy_(tensor)
    if layout == "guarded":
        *outer, rows, columns = tensor.shape
        wide = tensor.new_full((*outer, rows + 2, columns + 3), math.nan)[..., 1:-1, 1:-2]
        return wide.copy_(tensor)
    return tensor


def make(
    shape: Shape,
    dtype: torch.dtype,
    gates: str,
    *,
    zeros: bool = False,
    gate_dtype: torch.dtype | None = None,
    masked: bool = False,
    base: bool = True,
    layouts: dict[str, str] | None = None,
    needs: set[str] | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose outputs are of order 1, the same on every machine.

    Args:
        gates: ``"token"``, ``"sample"`` or ``"batch"``: linear gates so reduced; ``"given …"``: values in that shape.
        zeros: all given gates but one of each row are 0.
        base: False sets W₀ and b to 0, so that nothing hides behind them.
        layouts: by tensor name, ``"upstream"`` included.
        needs: names of the tensors that need gradients; all of them where None.
    """
    leading, d_in, d_out, experts, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str, *size: int, terms: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) / math.sqrt(terms)
        return laid_out(values.to(DEVICE, dtype), (layouts or {}).get(name, "plain"))

    tensors = dict(
        x=normal("x", *leading, d_in),
        weight=normal("weight", d_out, d_in, terms=d_in) * base,
        bias=normal("bias", d_out) * base,
        A=normal("A", experts, rank, d_in, terms=d_in),
        B=normal("B", experts, rank, d_out, terms=rank).mT,  # as `MingleLinear` stores it
    )
    options: dict[str, Any] = {}
    if gates.startswith("given"):
        rows = {"batch": (), "sample": leading[:-1], "token": leading}[gates.removeprefix("given ")]
        tensors["gates"] = normal("gates", *rows, experts, dtype=gate_dtype or dtype)
        if zeros:
            chosen = torch.randint(experts, rows, generator=generator).to(DEVICE)
            tensors["gates"] *= nn.functional.one_hot(chosen, experts).to(tensors["gates"].dtype)
    else:
        tensors["gate_weight"] = normal("gate_weight", experts, d_in, terms=d_in, dtype=gate_dtype or dtype)
        tensors["gate_bias"] = normal("gate_bias", experts, dtype=gate_dtype or dtype)
        options["reduce"] = gates
    if masked:
        options["mask"] = (torch.rand(leading, generator=generator) < 0.6).to(DEVICE)
    return Problem(tensors, options, [name for name in tensors if needs is None or name in needs], normal("upstream", *leading, d_out))


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach().double()).norm())


def check(problem: Problem, backend: str, arithmetic: Arithmetic) -> None:
    """Every result of `backend` against the formula in float64."""
    exact, sizes, got = problem.exact(), problem.sizes(), problem.solve(backend)
    for name, value in exact.items():
        tensor = problem.tensors.get(name, problem.tensors["x"])
        assert got[name].dtype == tensor.dtype and got[name].shape == value.shape, name
        allowed = arithmetic.limit * float(value.norm())
        if name.startswith("gate"):  # sums over all tokens, which may cancel to a handful of small numbers
            allowed = max(allowed, arithmetic.rounding * sizes[name])
        assert distance(got[name], value) <= allowed, name


# TF32 and fp16 run the same code as fp32 and bf16 but for the instruction: three shapes are enough
CASES = [*product(SHAPES, ("float32", "bfloat16")), *product(("ViT-B/16, four images", "one image", "ragged"), ("tf32", "float16"))]


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
    check(make(SHAPES["one image"], torch.bfloat16, gates, gate_dtype=torch.float32, needs={"x", "gate_weight"}), backend, arithmetic)


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
    check(make(RAGGED._replace(experts=experts), arithmetic.dtype, gates, zeros=True, needs=needs), backend, arithmetic)


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
def test_errors_are_at_most_twice_those_of_the_formula_in_the_same_dtype(shape, arithmetic, gates, backend):
    """Not for TF32, whose rounding of the operands libraries do in different ways."""
    problem = make(SHAPES[shape], arithmetic.dtype, gates)
    exact, eager, got = problem.exact(), problem.solve("eager"), problem.solve(backend)
    for name in ("y", "x", "weight", "bias", "A", "B"):  # thousands of elements: no luck in the ratio
        assert distance(got[name], exact[name]) <= 2 * distance(eager[name], exact[name]), name


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
    assert torch.equal(problem.solve(backend)["y"], nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"]))


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


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("reduce", ["token", "sample"])
def test_layers_that_share_their_input_give_what_each_alone_gives(reduce, backend):
    problems = [
        make(RAGGED._replace(experts=experts), torch.float32, reduce, needs={"x", "gate_weight"}, seed=experts) for experts in (2, 5)
    ]
    names = ("weight", "bias", "A", "B", "gate_weight", "gate_bias")
    x = problems[0].tensors["x"].requires_grad_()
    layers = [Projection(*(problem.tensors[name].requires_grad_(name == "gate_weight") for name in names)) for problem in problems]
    leaves = [x, *(layer.gate_weight for layer in layers)]
    alone = [gated_experts(x, *layer[:6], reduce=reduce, backend="eager") for layer in layers]
    shared = gated_experts_shared(x, layers, reduce=reduce, backend=backend)
    gradients = [torch.autograd.grad(ys, leaves, [problem.upstream for problem in problems]) for ys in (shared, alone)]
    for got, expected in zip((*shared, *gradients[0]), (*alone, *gradients[1]), strict=True):
        assert distance(got, expected) <= 4e-6 * expected.norm()


# ---- determinism and memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gates", "zeros"), [*((gates, False) for gates in GATES), ("given sample", True)])
@pytest.mark.parametrize("shape", ["ViT-B/16, four images", "ragged"])
def test_fifty_repetitions_give_equal_bits(shape, gates, zeros, dtype, backend):
    problem = make(SHAPES[shape], dtype, gates, zeros=zeros, needs={"x"} if zeros else None)
    first = problem.solve(backend)
    for _ in range(50):
        again = problem.solve(backend)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS asks for an environment variable; only the filling is wanted here
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("zeros", "needs"), [(False, None), (False, set()), (True, {"x"}), (True, set())])
def test_every_element_of_every_result_is_written(gates, masked, zeros, needs, backend):
    assert torch.empty(1, device=DEVICE).isnan().all()
    for shape in (RAGGED, RAGGED._replace(experts=64, rank=3)):
        problem = make(shape, torch.float32, gates, zeros=zeros, masked=masked, needs=needs)
        for name, value in problem.solve(backend).items():
            assert value.isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", ["x", "y", "H"])
def test_tensors_of_more_than_two_to_the_thirty_one_elements(wide, backend):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GB of free memory")
    tokens = (1 << 20) + 300
    d_in, d_out, experts, rank = {"x": (2056, 64, 2, 16), "y": (64, 2056, 2, 16), "H": (64, 64, 8, 257)}[wide]
    assert tokens * {"x": d_in, "y": d_out, "H": experts * rank}[wide] > 1 << 31
    small = make(Shape((300,), d_in, d_out, experts, rank), torch.bfloat16, "token", needs={"x"})
    x = torch.randn(tokens, d_in, device=DEVICE, dtype=torch.bfloat16)
    upstream = torch.randn(tokens, d_out, device=DEVICE, dtype=torch.bfloat16)
    got = small._replace(tensors=small.tensors | dict(x=x), upstream=upstream).solve(backend)
    for rows in (slice(0, 300), slice(-300, None)):
        part = small._replace(tensors=small.tensors | dict(x=x[rows]), upstream=upstream[rows])
        for name, value in part.exact().items():
            assert distance(got[name][rows], value) <= 1e-2 * value.norm(), name
    del x, upstream, got
    torch.cuda.empty_cache()


# ---- streams, graphs, devices


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what `call` launches, and the tensors that a replay writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("gates", "zeros"), [("token", False), ("sample", False), ("batch", False), ("given sample", True)])
@pytest.mark.parametrize("backward", [False, True])
def test_captured_graphs_replay_with_other_inputs(gates, zeros, backward, backend):
    """Capturing also shows that nothing is read on the host."""
    needs = (None if not zeros else {"x"}) if backward else set()
    problem = make(RAGGED, torch.bfloat16, gates, zeros=zeros, needs=needs)
    graph, captured = capture(lambda: problem.solve(backend))
    for seed in (1, 2, 3):
        other = make(RAGGED, torch.bfloat16, gates, zeros=zeros, needs=needs, seed=seed)
        for name, tensor in problem.tensors.items():
            tensor.copy_(other.tensors[name])
        problem.upstream.copy_(other.upstream)
        graph.replay()
        torch.cuda.synchronize()
        exact, sizes = other.exact(), other.sizes()
        for name, value in exact.items():
            assert distance(captured[name], value) <= max(1e-2 * float(value.norm()), 2.0**-7 * sizes[name]), name


def test_kernels_run_on_the_current_stream():
    problem = make(RAGGED, torch.float32, "sample")
    expected = problem.solve("triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x = torch.full_like(problem.tensors["x"], math.nan)
        torch.cuda._sleep(20_000_000)  # cycles, some ten milliseconds: a kernel on another stream would come before the copy
        x.copy_(problem.tensors["x"])
        got = problem._replace(tensors=problem.tensors | dict(x=x)).solve("triton")
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no tensor can be elsewhere than on the current device")
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("gates", ["sample", "batch", "given sample"])
def test_tensors_need_not_be_on_the_current_device(gates, backend):
    problem = make(RAGGED, torch.float32, gates)
    elsewhere = problem.mapped(lambda tensor: tensor.to("cuda:1"))
    with torch.cuda.device(0):
        got = elsewhere.solve(backend)
        assert torch.cuda.current_device() == 0
    for name, value in problem.solve(backend).items():
        assert got[name].device == torch.device("cuda:1")
        assert distance(got[name].to(value.device), value) <= 4e-6 * value.norm(), name


def test_tensors_on_several_devices_are_named():
    problem = make(RAGGED, torch.float32, "sample")
    tensors = problem.tensors | dict(A=problem.tensors["A"].cpu())
    with pytest.raises(TypeError, match="A is on cpu, x on cuda:0"):
        gated_experts(**tensors)


def test_float64_is_refused_by_the_kernels_and_served_by_auto():
    problem = make(RAGGED, torch.float64, "sample")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: .*float64"):
        problem.solve("triton")
    for name, value in problem.exact().items():
        assert distance(problem.solve("auto")[name], value) <= 1e-12 * value.norm(), name


# ---- the compiler


def layer(backend: str, dtype: torch.dtype = torch.bfloat16) -> mingle.MingleLinear:
    torch.manual_seed(0)
    grown = mingle.MingleLinear.from_linear(nn.Linear(96, 72, device=DEVICE, dtype=dtype), "sample", backend=backend)
    for _ in range(3):
        A, B = torch.randn(8, 96, device=DEVICE, dtype=dtype) / 96**0.5, torch.randn(72, 8, device=DEVICE, dtype=dtype) / 8**0.5
        grown.add_expert(A, B, gate_bias=0.5)
    return grown


@pytest.fixture
def _no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_layers_agree_and_have_no_graph_break(training, mode, backend):
    plain = layer(backend)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, mode=mode)
    for seed in range(4):  # to warm up, to record a CUDA graph and to replay it
        generator = torch.Generator(DEVICE).manual_seed(seed)
        x, dy = (torch.randn(6, 50, width, generator=generator, device=DEVICE, dtype=torch.bfloat16) for width in (96, 72))
        results = []
        for module in (plain, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = x.clone().requires_grad_(training)
            with torch.set_grad_enabled(training):
                y = module(leaf)
            gradients = torch.autograd.grad(y, [leaf, module.gate_weight, module.gate_bias], dy) if training else ()
            results.append([tensor.detach().clone() for tensor in (y, *gradients)])
        for expected, got in zip(*results, strict=True):
            assert distance(got, expected) <= 1e-2 * expected.norm()


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_graph_serves_any_number_of_tokens(backend):
    plain = layer(backend)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for samples, tokens in ((4, 50), (3, 37), (2, 197)):
            x = torch.randn(samples, tokens, 96, device=DEVICE, dtype=torch.bfloat16)
            expected = plain(x)
            assert distance(compiled(x), expected) <= 1e-2 * expected.norm()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(dtype, backend):
    module = layer(backend, torch.float32)
    x = torch.randn(6, 50, 96, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = module(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(module).double()
    exact.backend = "eager"
    expected = exact(x.double())
    assert distance(y, expected) <= 1e-2 * expected.norm()
    y.float().square().sum().backward()
    assert x.grad.dtype == module.gate_weight.grad.dtype == torch.float32
    assert x.grad.isfinite().all() and module.gate_weight.grad.isfinite().all()


@pytest.mark.parametrize("given_gates", [False, True])
def test_opcheck(given_gates):
    problem = make(RAGGED, torch.float32, "given sample" if given_gates else "sample")
    tensors = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}
    names = ("weight", "bias", "A", "B", "gate_weight", "gate_bias", "gates")
    arguments = [tensors["x"].flatten(0, 1).detach().requires_grad_(), *map(tensors.get, names), None]
    torch.library.opcheck(ops.gated_experts, (*arguments, RAGGED.leading[1], 0, False, True, "triton"))


# ---- speed


def test_another_number_of_tokens_compiles_nothing(monkeypatch):
    """Sizes that share a tile share the code; Triton would by itself make new code for the values 1 and multiples of 16."""
    triton = pytest.importorskip("triton")
    from mingle.kernels import fold
    from mingle.kernels import gated_experts as kernels

    compiled: list[str] = []
    for kernel in (kernels.shrink_kernel, kernels.expand_kernel, kernels.upstream_kernel, fold.fold_kernel):
        kernel.device_caches.clear()  # what other tests compiled
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(found["repr"]))

    def steps(*sizes: tuple[int, int]) -> None:
        for reduce, leading in product(("token", "sample", "batch"), sizes):
            make(Shape(leading, 104, 72, 3, 8), torch.bfloat16, reduce).solve("triton")

    steps((2, 50))
    assert compiled
    compiled.clear()
    steps((2, 50), (2, 41), (2, 64), (3, 37), (2, 33))  # 65 to 128 tokens, samples of 33 to 64
    assert not compiled


def seconds(*graphs: torch.cuda.CUDAGraph, rounds: int = 40, replays: int = 5) -> list[float]:
    """The median time of each graph by CUDA events, the graphs taking turns; the host's share stays out."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, own in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) / 1e3 / replays)
    return [statistics.median(own) for own in times]


def test_the_cost_of_one_expert_per_sample_hardly_depends_on_how_many_there_are():
    many, one = (
        make(Shape((128, 197), 768, 768, experts, 64), torch.bfloat16, "given sample", zeros=True, needs=set()) for experts in (64, 1)
    )
    chosen = torch.arange(128, device=DEVICE) // 2
    many.tensors["gates"].copy_(nn.functional.one_hot(chosen, 64))
    one.tensors["gates"].fill_(1)
    with torch.no_grad():
        (long_graph, _), (short_graph, _) = (capture(lambda problem=problem: problem.solve("triton")) for problem in (many, one))
    long, short = seconds(long_graph, short_graph)
    assert long <= 1.3 * short, f"{long * 1e6:.0f} µs with 64 experts, {short * 1e6:.0f} µs with one"


def test_auto_runs_what_the_model_of_costs_says(monkeypatch):
    asked = []
    real = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda *arguments: (asked.append(real(*arguments)), asked[-1])[1])
    problem = make(SHAPES["one image"], torch.bfloat16, "token", needs=set())
    problem.solve("auto")
    assert asked == [("triton", False)]
