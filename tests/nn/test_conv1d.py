"""GPT-2's Conv1D, a linear layer with a transposed weight, takes experts like any other."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import mingle
from mingle import MingleLinear
from mingle.adaptation.fast_forward import fast_linears, lowered
from mingle.nn.conv1d import is_conv1d


def conv(d_in=6, d_out=10, dtype=torch.float64):
    layer = Conv1D(d_out, d_in).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(16, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(6,), (7, 6), (3, 5, 6), (2, 3, 5, 6), (0, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_experts_it_is_bitwise_the_layer(shape, dtype):
    layer = conv(dtype=dtype)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(MingleLinear.from_linear(layer)(x), layer(x).view(*shape[:-1], 10))


@pytest.mark.parametrize("backend", ["eager", "grouped"])
@pytest.mark.parametrize("prepack", [False, True])
def test_with_experts_it_is_the_layer_plus_their_updates(backend, prepack):
    layer = conv()
    ours = MingleLinear.from_linear(layer, "token", backend=backend, prepack=prepack)
    factors = [(torch.randn(r, 6).double(), torch.randn(10, r).double()) for r in (2, 3)]
    for A, B in factors:
        ours.add_expert(A, B, gate_weight=torch.randn(6), gate_bias=0.5)
    x = torch.randn(4, 5, 6).double().requires_grad_()
    weight, bias = ours.all_gates()
    expected = layer(x) + sum(
        (x @ w.double() + b.double()).unsqueeze(-1) * (x @ A.T @ B.T)
        for (A, B), w, b in zip(factors, weight, bias, strict=True)
    )
    y, direction = ours(x), torch.randn(4, 5, 10).double()
    torch.testing.assert_close(y, expected)
    wanted = (x, ours.gate_weight, ours.gate_bias)
    found, right = (torch.autograd.grad(out, wanted, direction) for out in (y, expected))
    torch.testing.assert_close(found, right)


def test_storage_is_shared_and_the_way_back_is_a_conv1d():
    layer = conv().requires_grad_(False)
    layer.bias.requires_grad_()
    x = torch.randn(3, 6).double()
    ours = MingleLinear.from_linear(layer)
    assert (ours.in_features, ours.out_features, ours.weight.shape) == (6, 10, (10, 6))
    assert ours.weight.data_ptr() == layer.weight.data_ptr()
    back = ours.to_linear()
    assert type(back) is Conv1D and (back.nx, back.nf) == (6, 10)
    assert back.weight.data_ptr() == layer.weight.data_ptr() and back.weight.is_contiguous()
    assert not back.weight.requires_grad
    assert torch.equal(back(x), layer(x))
    assert MingleLinear.from_linear(conv()).to_linear().weight.requires_grad


def test_the_way_back_draws_no_random_numbers():
    ours, state = MingleLinear.from_linear(conv()), torch.get_rng_state()
    ours.to_linear()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_whole_gpt2_and_back(gpt2, tokens):
    expected, before = gpt2(tokens).logits, copy.deepcopy(gpt2.state_dict())
    layers = mingle.inject(gpt2, ("attn.c_attn", "c_proj", "c_fc"))
    assert len(layers) == 8
    assert torch.equal(gpt2(tokens).logits, expected)
    assert set(mingle.restore(gpt2)) == set(layers)
    assert all(type(gpt2.get_submodule(name)) is Conv1D for name in layers)
    assert torch.equal(gpt2(tokens).logits, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gpt2.state_dict().items())


def test_state_dicts_keep_the_weight_as_gpt2_has_it(gpt2, tokens):
    """A square weight would otherwise load the wrong way round without a word."""
    plain, ours = gpt2.state_dict(), copy.deepcopy(gpt2)
    layers = mingle.inject(ours, ("c_attn", "c_proj"))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in plain.items())
    changed = {name: tensor + 0.1 for name, tensor in plain.items()}
    ours.load_state_dict(changed, strict=False)
    gpt2.load_state_dict(changed)
    assert torch.equal(ours(tokens).logits, gpt2(tokens).logits)

    for layer in layers.values():
        layer.add_expert(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    own = {name: tensor for name, tensor in ours.state_dict().items() if name != "lm_head.weight"}
    saved = load(save(own))  # which takes no transposed views
    again = copy.deepcopy(gpt2)
    mingle.inject(again, ("c_attn", "c_proj"))
    again.load_state_dict(saved, strict=False)
    assert torch.equal(again(tokens).logits, ours(tokens).logits)


def test_other_dtypes_and_copies(gpt2):
    layer = mingle.inject(gpt2, "c_attn")["transformer.h.0.attn.c_attn"]
    half = copy.deepcopy(layer).bfloat16()
    assert type(half.to_linear()) is Conv1D
    assert torch.equal(half.to_linear().weight, layer.to_linear().weight.bfloat16())


def test_layers_that_read_the_same_input():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = conv(), conv(), conv()

        def forward(self, x):
            return self.q(x) * self.k(x) * self.v(x)

    model, x = Attention(), torch.randn(3, 5, 6).double()
    for layer in mingle.inject(model, ("q", "k", "v")).values():
        layer.add_expert(torch.randn(2, 6), torch.randn(10, 2), gate_bias=1.0)
    expected = model(x)
    assert mingle.share_inputs(model, [("q", "k", "v")]) == [("q", "k", "v")]
    torch.testing.assert_close(model(x), expected)


def test_fast_products(gpt2, tokens):
    gpt2.requires_grad_(False)
    expected = gpt2(tokens).logits
    hidden = gpt2.transformer.wte(tokens).requires_grad_()
    (gradient,) = torch.autograd.grad(gpt2(inputs_embeds=hidden).logits.sum(), hidden)
    with fast_linears(gpt2):
        assert "forward" in vars(gpt2.transformer.h[0].mlp.c_fc)
        torch.testing.assert_close(gpt2(tokens).logits, expected)
        (fast,) = torch.autograd.grad(gpt2(inputs_embeds=hidden).logits.sum(), hidden)
        torch.testing.assert_close(fast, gradient)
    assert "forward" not in vars(gpt2.transformer.h[0].mlp.c_fc)


def test_fast_products_leave_training_layers_as_they_are():
    layer, x = conv(dtype=torch.float32), torch.randn(3, 6)
    with fast_linears(layer):
        layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0)[:, None].expand(6, 10))


def test_frozen_weights_are_lowered_and_put_back(gpt2, tokens):
    gpt2.requires_grad_(False)
    layer = gpt2.transformer.h[0].attn.c_attn
    before, expected = layer.weight, gpt2(tokens).logits
    with lowered(gpt2, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
        torch.testing.assert_close(gpt2(tokens).logits.float(), expected, rtol=0.05, atol=0.05)
    assert layer.weight is before


def test_subclasses_are_refused():
    class Other(Conv1D):
        pass

    with pytest.raises(ValueError, match="layer '0' is a Other, not a torch.nn.Linear"):
        mingle.inject(nn.Sequential(Other(4, 3)), "0")


def test_transformers_is_not_imported_to_find_out(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    assert not is_conv1d(nn.Linear(2, 2))
    mingle.restore(model := nn.Sequential(MingleLinear.from_linear(nn.Linear(2, 2))))
    assert type(model[0]) is nn.Linear
    assert "transformers.pytorch_utils" not in sys.modules
