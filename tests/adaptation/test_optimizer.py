"""A step on all gates at once: projection, Adam, and steps that are not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mingle import MingleLinear
from mingle.adaptation.optimizer import GateStep
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
