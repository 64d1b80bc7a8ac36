"""Experts go into the layers that were named, and come out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mingle
from mingle.nn.linear import MingleLinear, count_parameters


def grown(experts=3, d_in=8, d_out=6, rank=2, reduce="sample") -> MingleLinear:
    layer = MingleLinear.from_linear(nn.Linear(d_in, d_out), reduce)
    for i in range(experts):
        layer.add_expert(torch.randn(rank + i % 2, d_in), torch.randn(d_out, rank + i % 2), gate_bias=0.1 * i)
    return layer


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "a": nn.ModuleDict({"fc1": nn.Linear(4, 4), "xfc1": nn.Linear(4, 4)}),
            "fc1": nn.Linear(4, 3, bias=False),
        }
    )


def test_inject_takes_exact_suffixes_and_restore_puts_the_base_back():
    net = model()
    before = {n: p.data_ptr() for n, p in net.named_parameters()}
    layers = mingle.inject(net, ("fc1",), reduce="token")
    assert list(layers) == ["a.fc1", "fc1"]
    assert isinstance(net["a"]["xfc1"], nn.Linear)
    assert mingle.inject(net, ("a.fc1",)) == {"a.fc1": layers["a.fc1"]}
    assert mingle.inject(net, "a.fc1") == {"a.fc1": layers["a.fc1"]}
    layers["fc1"].add_expert(torch.randn(1, 4), torch.randn(3, 1))
    assert mingle.restore(net) == ["a.fc1", "fc1"]
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == before
    assert all(p.requires_grad for p in net.parameters())
    assert type(net["fc1"]) is nn.Linear


def test_inject_errors_name_the_nearest_layer_and_change_nothing():
    net = model()
    with pytest.raises(ValueError, match="no Linear layer's name ends in 'fc2'; did you mean 'fc1'"):
        mingle.inject(net, ("fc1", "fc2"))
    assert type(net["fc1"]) is nn.Linear
    attention = nn.MultiheadAttention(4, 1)
    with pytest.raises(ValueError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        mingle.inject(attention, ("out_proj",))
    with pytest.raises(
        ValueError, match="'linear1' cannot take experts: torch.nn.TransformerEncoderLayer reads its weight"
    ):
        mingle.inject(nn.TransformerEncoderLayer(8, 2), ("linear1",))


class OwnWords(nn.Linear):
    """Computes what a Linear does, as Falcon's layers do."""

    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Noted(OwnWords):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.ones(()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_that_computes_a_linear_takes_experts_and_comes_back_as_it_was(bias):
    net, x = nn.ModuleDict({"fc": OwnWords(4, 3, bias)}), torch.randn(2, 5, 4)
    expected, state = net["fc"](x), torch.get_rng_state()
    layer = mingle.inject(net, "fc")["fc"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(layer(x), expected)
    layer.add_expert(torch.randn(1, 4), torch.randn(3, 1))
    assert mingle.restore(net) == ["fc"]
    assert type(net["fc"]) is OwnWords
    assert torch.equal(net["fc"](x), expected)


@pytest.mark.parametrize("kind", [Doubled, Noted])
def test_a_subclass_that_may_compute_something_else_is_refused(kind):
    with pytest.raises(ValueError, match=f"'fc' is a {kind.__name__}, not a torch.nn.Linear"):
        mingle.inject(nn.ModuleDict({"fc": kind(4, 3)}), "fc")


def test_parameter_counts():
    layer = grown(2, rank=2)
    trainable, total = count_parameters(layer)
    assert trainable == 9
    assert total == 8 * 6 + 6 + 2 * 3 * (8 + 6) + 2 * 9
