"""A step on all gates at once: projection, Adam, and steps that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mingle import MingleLinear
from mingle.adaptation.optimizer import GateStep, captured
from mingle.adaptation.projector import RelaxedProjector


def layers_with_gates(widths=(6, 4, 6), rows=1):
    found = {}
    for i, width in enumerate(widths):
        layer = MingleLinear.from_linear(nn.Linear(width, 5))
        for _ in range(rows):
            layer.add_expert(torch.randn(2, width), torch.randn(5, 2))
        layer.set_trainable_gates(rows)
        found[f"layer{i}"] = layer
    return found


@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_is_projection_and_adam(rows):
    layers = layers_with_gates(rows=rows)
    twins = copy.deepcopy(layers)
    bases = {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
    step = GateStep(layers, 0.01, RelaxedProjector(bases))
    projector = RelaxedProjector(bases, backend="eager")
    adam = torch.optim.Adam(
        [p for twin in twins.values() for p in (twin.gate_weight, twin.gate_bias)], lr=0.01, foreach=False
    )
    for _ in range(30):
        x = {name: torch.randn(3, layer.in_features) for name, layer in layers.items()}
        step.zero_grad()
        adam.zero_grad(set_to_none=False)
        loss = sum(layer(x[name]).square().mean() for name, layer in layers.items())
        loss.backward()
        sum(twin(x[name]).square().mean() for name, twin in twins.items()).backward()
        assert step.step(loss) == 0
        projector.apply_({name: twin.gate_weight.grad for name, twin in twins.items()})
        adam.step()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.gate_weight, twins[name].gate_weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.gate_bias, twins[name].gate_bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["weight", "bias", "loss"])
def test_a_non_finite_gradient_skips_the_step_and_leaves_the_interference_as_it_was(where):
    layers = layers_with_gates()
    step = GateStep(
        layers,
        0.1,
        RelaxedProjector({name: torch.eye(layer.in_features)[:, :2] for name, layer in layers.items()}),
    )
    loss = torch.ones(())
    step.gradients.fill_(1.0)
    step.step(loss)
    before = [p.clone() for p in step.gates] + [step.projector.interferences.clone()]
    moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
    step.gradients.fill_(1.0)
    if where == "loss":
        loss = torch.full((), math.nan)
    else:
        getattr(layers["layer1"], f"gate_{where}").grad.view(-1)[-1] = math.inf
    assert step.step(loss) == 1
    broken = [name for name, whole in zip(step.names, step.finite(), strict=True) if not whole]
    assert broken == (["layer1"] if where == "weight" else [])
    assert all(
        torch.equal(a, b) for a, b in zip([*step.gates, step.projector.interferences], before, strict=True)
    )
    assert all(
        torch.equal(s["exp_avg"], m) for s, m in zip(step.optimizer.state.values(), moments, strict=True)
    )
    step.gradients.fill_(1.0)
    assert step.step(torch.ones(())) == 0
    assert not any(torch.equal(a, b) for a, b in zip(step.gates, before, strict=False))


def test_accumulated_gradients_advance_the_interference_once():
    layers = layers_with_gates((4,))
    step = GateStep(layers, 0.1, RelaxedProjector({"layer0": torch.eye(4)[:, :1]}, beta=0.5))
    layer = layers["layer0"]
    for _ in range(3):
        loss = layer(torch.ones(2, 4)).sum()
        loss.backward()
    step.step(loss)
    # |G u| / ‖G‖ = 1/2 for equal entries, whatever their size
    expected = 0.5 * layer.gate_weight.grad.new_ones(1) / 2
    torch.testing.assert_close(step.projector.interferences, expected)


class FakeCuda:
    """What `captured` uses of torch.cuda; captures end with an error and leave everything as it is then."""

    def __init__(self) -> None:
        self.streams = {0: "stream of device 0", 1: "stream of device 1"}
        self.device, self.random = 0, {0: "state 0", 1: "state 1"}

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        class Generator:
            def __init__(self, device: int) -> None:
                self.device = device

            def clone_state(self) -> str:
                return fake.random[self.device]

            def graphsafe_set_state(self, state: str) -> None:
                fake.random[self.device] = state

        @contextmanager
        def device(wanted: torch.device) -> Iterator[None]:
            before, fake.device = fake.device, wanted.index
            yield
            fake.device = before

        @contextmanager
        def stream(wanted: object) -> Iterator[None]:
            before, fake.streams[fake.device] = fake.streams[fake.device], wanted
            yield
            fake.streams[fake.device] = before

        class Graph:
            def __init__(self, graph: object) -> None: ...

            def __enter__(self) -> None:
                fake.streams[fake.device] = "the capture's stream"
                fake.random[fake.device] = "capturing"

            def __exit__(self, *error: object) -> None:
                raise RuntimeError("operation failed due to a previous error during capture")

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": object,
            "device": device,
            "stream": stream,
            "graph": Graph,
            "synchronize": lambda: None,
            "current_device": lambda: fake.device,
            "current_stream": lambda: _Named(fake.streams[fake.device]),
            "set_stream": lambda one: fake.streams.__setitem__(fake.device, getattr(one, "name", one)),
            "default_generators": [Generator(0), Generator(1)],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        arange = torch.arange
        monkeypatch.setattr(torch, "arange", lambda *sizes, device=None, **options: arange(*sizes, **options))


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: object) -> None: ...


def test_a_capture_that_fails_leaves_streams_generators_and_gates_as_they_were(monkeypatch):
    step = GateStep(layers_with_gates(), 0.1)
    before = [gate.detach().clone() for gate in step.gates]
    cuda = FakeCuda()
    cuda.patch(monkeypatch)
    devices = []

    def advance(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        devices.append(cuda.device)
        step.gradients.fill_(1.0)
        return torch.ones(()), step.step(torch.ones(()))

    assert captured(advance, step, 3, torch.device("cuda", 1)) is advance
    assert (
        devices == [1, 1, 1, 1] and cuda.device == 0
    )  # three to warm up and the one recorded, on the model's
    assert cuda.streams == FakeCuda().streams and cuda.random == FakeCuda().random
    assert all(torch.equal(gate, old) for gate, old in zip(step.gates, before, strict=True))
