"""The kernels on a GPU: CUDA graphs, streams, devices."""

from __future__ import annotations

import math

import pytest
import torch
from gpu_cases import BACKENDS, RAGGED, SHAPES, capture, distance, make
from torch import nn

from mingle import functional
from mingle.functional import gated_experts
from mingle.kernels import launches
from mingle.nn.linear import MingleLinear

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(
    ("gates", "zeros"), [("token", False), ("sample", False), ("batch", False), ("given sample", True)]
)
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
            assert distance(captured[name], value) <= max(
                1e-2 * float(value.norm()), 2.0**-7 * sizes[name]
            ), name


def test_kernels_run_on_the_current_stream():
    problem = make(RAGGED, torch.float32, "sample")
    expected = problem.solve("triton")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x = torch.full_like(problem.tensors["x"], math.nan)
        # cycles, some ten milliseconds: a kernel on another stream would come before the copy
        torch.cuda._sleep(20_000_000)
        x.copy_(problem.tensors["x"])
        got = problem._replace(tensors=problem.tensors | dict(x=x)).solve("triton")
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("shape", [RAGGED, *map(SHAPES.get, ("one image", "many experts", "ViT-B/32"))])
@pytest.mark.parametrize(
    ("gates", "zeros"),
    [("token", False), ("sample", False), ("batch", False), ("given sample", False), ("given sample", True)],
)
def test_repeated_launches_give_the_bits_of_those_that_triton_makes(shape, gates, zeros, monkeypatch):
    """In forward and backward, from the third call on, with tensors that are elsewhere each time."""
    repeated = []
    repeat = launches._Recording.repeat
    monkeypatch.setattr(
        launches._Recording, "repeat", lambda *arguments: repeated.append(1) or repeat(*arguments)
    )
    needs = {"x"} if zeros else None
    for seed in range(4):
        problem = make(shape, torch.bfloat16, gates, zeros=zeros, needs=needs, seed=seed)
        repeated.clear()
        got = problem.solve("triton")
        with monkeypatch.context() as patch:
            patch.setattr(launches, "_stream", lambda tensor: None)
            expected = problem.solve("triton")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got), seed
    assert repeated


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_goes_past_what_is_settled_and_joins_no_gates(dtype, reduce, backend, monkeypatch):
    layer = MingleLinear.from_linear(nn.Linear(96, 80, device="cuda", dtype=dtype), reduce, backend=backend)
    for _ in range(3):
        layer.add_expert(torch.randn(8, 96) / 10, torch.randn(80, 8) / 3)
    layer(torch.randn(4, 10, 96, device="cuda", dtype=dtype))  # which settles it
    needed = [layer.gate_weight, layer.gate_bias]
    for _ in range(4):
        x = torch.randn(4, 10, 96, device="cuda", dtype=dtype, requires_grad=True)
        expected = gated_experts(x, *layer.tensors(), reduce=reduce, frozen_gates=2, backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "gated_experts", None)
            patch.setattr(torch, "cat", None)
            y = layer(x)
            with torch.no_grad():
                assert torch.equal(layer(x), expected)
        assert torch.equal(y, expected)
        dy = torch.randn_like(y)
        pairs = zip(*(torch.autograd.grad(one, [x, *needed], dy) for one in (y, expected)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="one GPU: no tensor can be elsewhere than on the current device"
)
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
