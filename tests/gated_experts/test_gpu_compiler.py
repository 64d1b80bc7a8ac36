"""The layers on a GPU under torch.compile, autocast and opcheck."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, RAGGED, distance, layer, make

from mingle import ops

pytestmark = pytest.mark.gpu


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
        x, dy = (
            torch.randn(6, 50, width, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            for width in (96, 72)
        )
        results = []
        for module in (plain, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = x.clone().requires_grad_(training)
            with torch.set_grad_enabled(training):
                y = module(leaf)
            gradients = (
                torch.autograd.grad(y, [leaf, module.gate_weight, module.gate_bias], dy) if training else ()
            )
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
