"""MingleLinear as a drop-in for torch.nn.Linear, and its life over several tasks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mingle.nn.linear import MingleLinear


def grown(experts=3, d_in=8, d_out=6, rank=2, reduce="sample") -> MingleLinear:
    layer = MingleLinear.from_linear(nn.Linear(d_in, d_out), reduce)
    for i in range(experts):
        layer.add_expert(torch.randn(rank + i % 2, d_in), torch.randn(d_out, rank + i % 2), gate_bias=0.1 * i)
    return layer


def test_no_experts_is_bitwise_the_base_and_shares_its_weight():
    linear = nn.Linear(8, 6)
    layer = MingleLinear.from_linear(linear)
    x = torch.randn(4, 5, 8)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert linear.weight.requires_grad
    assert (layer.in_features, layer.out_features) == (8, 6)


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_is_the_sum_of_its_experts(reduce):
    layer, x = grown(reduce=reduce), torch.randn(4, 5, 8)
    seen = {"token": x, "sample": x.mean(1, keepdim=True), "batch": x.mean((0, 1), keepdim=True)}[reduce]
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    weight, bias = layer.all_gates()
    for i, expert in enumerate(layer.experts()):
        expected = expected + (seen @ weight[i] + bias[i])[..., None] * (x @ expert.delta().T)
    torch.testing.assert_close(layer(x), expected)


def test_lower_ranks_are_padded_with_zeros():
    layer = grown()
    assert layer.A.shape == (3, 3, 8)
    assert layer.B.shape == (3, 6, 3)
    assert not layer.A[0, 2].any()


def test_only_the_newest_gate_trains():
    layer = grown()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"gate_weight", "gate_bias"}
    assert layer.gate_weight.shape == (1, 8)
    frozen = {n: p.detach().clone() for n, p in layer.named_parameters() if not p.requires_grad}
    newest = layer.gate_weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 5, 8)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in layer.named_parameters() if n in frozen)
    assert not torch.equal(layer.gate_weight, newest)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
@pytest.mark.parametrize("everything", [False, True], ids=["trainable parameters", "all parameters"])
def test_frozen_gates_stay_bitwise_under_momentum_and_weight_decay(name, everything):
    layer = grown()
    frozen = [layer.frozen_gate_weight, layer.frozen_gate_bias]
    before, newest = [gate.detach().clone() for gate in frozen], layer.gate_weight.detach().clone()
    parameters = [p for p in layer.parameters() if everything or p.requires_grad]
    options = {} if name.startswith("Adam") else dict(momentum=0.9)
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1, weight_decay=0.1, **options)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(4, 5, 8)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(gate, was) for gate, was in zip(frozen, before, strict=True))
    assert not torch.equal(layer.gate_weight, newest)


def test_adding_an_expert_keeps_the_trained_gate():
    layer = grown(1)
    with torch.no_grad():
        layer.gate_weight.fill_(0.5)
    layer.add_expert(torch.randn(2, 8), torch.randn(6, 2), gate_weight=torch.ones(8))
    assert torch.equal(layer.frozen_gate_weight, torch.full((1, 8), 0.5))
    assert torch.equal(layer.gate_weight, torch.ones(1, 8))


def test_any_number_of_gates_can_train():
    layer = grown()
    before = layer.all_gates()[0].detach().clone()
    for count in (3, 0, 2):
        layer.set_trainable_gates(count)
        assert len(layer.gate_weight) == count
        assert layer.gate_weight.requires_grad == (count > 0)
        assert torch.equal(layer.all_gates()[0], before)
    with pytest.raises(ValueError, match="3 experts"):
        layer.set_trainable_gates(4)


def test_new_gates_are_drawn_with_the_published_deviation():
    layer = MingleLinear.from_linear(nn.Linear(4096, 2))
    layer.add_expert(torch.zeros(1, 4096), torch.zeros(2, 1))
    assert layer.gate_weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.gate_bias.item() == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle_make_layers_that_behave_alike(clone):
    layer, x = grown(), torch.randn(2, 3, 8)
    other = clone(layer)
    assert torch.equal(other(x), layer(x))
    other.add_expert(torch.randn(2, 8), torch.randn(6, 2))
    assert layer.num_experts == 3


@pytest.mark.parametrize("receiver", [0, 1, 5])
def test_state_dict_round_trip_is_strict_for_any_number_of_experts(receiver):
    layer, x = grown(), torch.randn(2, 3, 8)
    other = grown(receiver)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), layer(x))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {"gate_weight", "gate_bias"}
    with pytest.raises(RuntimeError, match="size mismatch"):
        MingleLinear.from_linear(nn.Linear(9, 6)).load_state_dict(layer.state_dict())


def test_bad_experts_are_refused():
    layer = grown()
    with pytest.raises(ValueError, match=r"expected \[r, 8\] and \[6, r\]"):
        layer.add_expert(torch.randn(2, 7), torch.randn(6, 2))
    with pytest.raises(ValueError, match="gate_weight has shape"):
        layer.add_expert(torch.randn(2, 8), torch.randn(6, 2), gate_weight=torch.zeros(7))
    with pytest.raises(RuntimeError):
        layer.add_expert(torch.randn(2, 8), torch.randn(6, 2), gate_bias=torch.zeros(2))
    before = layer.state_dict()
    with pytest.raises(NotImplementedError, match="meta"):
        layer.add_expert(torch.randn(2, 8), torch.randn(6, 2, device="meta"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(ValueError, match="reduce='mean'"):
        MingleLinear.from_linear(nn.Linear(2, 2), "mean")
    assert layer.num_experts == 3


def test_strided_factors_are_accepted():
    layer, x = MingleLinear.from_linear(nn.Linear(8, 6)), torch.randn(2, 3, 8)
    A, B = torch.randn(8, 2), torch.randn(2, 6)
    layer.add_expert(A.T, B.T, gate_weight=torch.zeros(8), gate_bias=1.0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight + (A @ B).T, layer.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_half_precision_layers_are_single_precision(dtype):
    layer = MingleLinear.from_linear(nn.Linear(6, 5).to(dtype))
    layer.add_expert(torch.randn(2, 6).to(dtype), torch.randn(5, 2).to(dtype))
    assert layer.gate_weight.dtype == layer.gate_bias.dtype == torch.float32
    y = layer(torch.randn(3, 4, 6).to(dtype))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    before = layer.gate_weight.detach().clone()
    torch.optim.Adam([layer.gate_weight], lr=1e-4).step()
    # a step this small would vanish in the roundings of half precision
    assert (layer.gate_weight.detach() - before).abs().max().item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 8), (3, 5, 8)])
def test_given_gates_of_a_sample_hold_for_all_of_its_rows(shape):
    layer = MingleLinear.from_linear(torch.nn.Linear(8, 4))
    for _ in range(2):
        layer.add_expert(torch.randn(2, 8), torch.randn(4, 2))
    x, gates = torch.randn(shape), torch.rand(3, 2)
    layer.given_gates = gates
    found = layer(x)
    for row in range(len(x)):
        layer.given_gates = gates[row * 3 // len(x)]
        torch.testing.assert_close(found[row], layer(x[row : row + 1])[0], rtol=1e-5, atol=1e-6)
    layer.given_gates = gates
    with pytest.raises(ValueError, match="gates has shape"):
        layer(torch.randn(4, 5, 8))
