"""``lr: auto``: a step moves gates as far in wide layers as in narrow ones, at any size of their inputs."""

from __future__ import annotations

import pytest
import torch
from small_merges import NAMES
from torch import nn

import mingle
from mingle.adaptation.learning_rates import STEP, learning_rates
from mingle.adaptation.optimizer import GateStep
from mingle.methods.mingle import MingleOptions
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskData, TaskType


class Plain(TaskType):
    """Runs a model on ``x``, of whose tokens ``mask`` says which count."""

    name = "plain"

    def logits(self, model, data):
        layer = model[0]
        layer.token_mask = data.inputs.get("mask")
        return model(data.inputs["x"]).mean(1)


def layer_of(width, reduce="sample"):
    layer = MingleLinear.from_linear(nn.Linear(width, 3), reduce)
    layer.add_expert(torch.randn(2, width), torch.randn(3, 2))
    layer.set_trainable_gates(1)
    return layer


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_it_is_the_step_over_the_mean_l1_norm_of_what_gates_see(reduce):
    torch.manual_seed(0)
    layer = layer_of(6, reduce)
    x, mask = torch.randn(20, 5, 6), torch.ones(20, 5, dtype=torch.bool)
    mask[:, 3:] = False
    x[:, 3:] = torch.nan
    data = TaskData({"x": x, "mask": mask})
    found = learning_rates(Plain(), nn.Sequential(layer), {"0": layer}, data)["0"]
    kept = x[:, :3]
    if reduce == "token":
        norm = kept.abs().sum(-1).mean()
    elif reduce == "sample":
        norm = kept.mean(1).abs().sum(-1).mean()
    else:  # batches of 16 and 4
        norm = (kept[:16].mean((0, 1)).abs().sum() + kept[16:].mean((0, 1)).abs().sum()) / 2
    assert found == pytest.approx(STEP / (float(norm) + 1), rel=1e-5)


@pytest.mark.parametrize(("width", "scale"), [(8, 1.0), (512, 1.0), (64, 20.0)])
def test_the_first_step_moves_gates_as_far(width, scale):
    torch.manual_seed(0)
    layer = layer_of(width)
    x = scale * torch.randn(1, 1, width)
    layers = {"0": layer}
    rates = learning_rates(Plain(), nn.Sequential(layer), layers, TaskData({"x": x}))
    step = GateStep(layers, rates)

    def gate():
        weight, bias = layer.all_gates()
        return float((x[0, 0] @ weight[0] + bias[0]).detach())

    before = gate()
    step.zero_grad()
    loss = layer(x).sum()
    loss.backward()
    assert step.step(loss) == 0
    assert abs(gate() - before) == pytest.approx(STEP, rel=1e-3)


def test_merges_take_it(base_model, tuned_states, samples):
    seeds = TaskData(samples[0].inputs, samples[0].shared)
    merger = mingle.Merger(base_model, "mingle", rank=4, steps=6, lr="auto")
    report = merger.add(NAMES[0], tuned_states[0], seeds)
    assert report.trace.loss[-1] < report.trace.loss[0]
    assert MingleOptions().lr == 1e-4  # as published
    with pytest.raises(ValueError, match="lr=-1"):
        mingle.Merger(base_model, "mingle", lr=-1.0)
    with pytest.raises(ValueError, match="lr: 'fast'"):
        mingle.Merger(base_model, "mingle", lr="fast")
