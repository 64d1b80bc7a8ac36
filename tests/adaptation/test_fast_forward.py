"""Products while only gates change: the faster library and bf16 copies give the same results, and leave no
trace.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mingle import MingleLinear
from mingle.adaptation import fast_forward
from mingle.kernels import gemm


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.expert = MingleLinear.from_linear(nn.Linear(6, 6))
        self.expert.add_expert(torch.randn(2, 6), torch.randn(6, 2))
        self.requires_grad_(False)
        self.expert.set_trainable_gates(1)

    def forward(self, x):
        q = self.expert(self.outer(F.gelu(self.inner(x))))
        return F.scaled_dot_product_attention(q, q, x.to(q.dtype))


@pytest.mark.parametrize("library", gemm.LIBRARIES)
def test_fast_linears_give_the_same_outputs_and_gradients(library, monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", library)
    calls, real = set(), gemm.linear

    def linear(x, weight, *more, **named):
        calls.add(weight)
        return real(x, weight, *more, **named)

    monkeypatch.setattr(gemm, "linear", linear)
    model, results = Block(), []
    plain = {model.inner.weight, model.outer.weight}
    x = torch.randn(3, 5, 6, requires_grad=True)
    for fast in (False, True):
        with fast_forward.fast_linears(model if fast else nn.Module()):
            y = model(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, model.expert.gate_weight])))
        assert calls & plain == (plain if fast else set())
    torch.testing.assert_close(*results)
    assert "forward" not in vars(model.inner)


def test_layers_that_train_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(
        gemm, "linear", lambda *_: pytest.fail("the faster library has no gradient of the weight")
    )
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with fast_forward.fast_linears(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_what_a_forward_was_replaced_by_is_left_alone():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x
    with fast_forward.fast_linears(layer):
        assert layer(1) == 1
    assert layer(2) == 2


def test_frozen_factors_are_lowered_and_put_back():
    model = Block()
    before = dict(model.named_parameters())
    values = copy.deepcopy(before)

    def stop():
        lowered = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
        assert lowered == {name for name in before if "gate" not in name}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), fast_forward.lowered(model, torch.bfloat16):
        stop()
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())


def test_bf16_passes_with_and_without_lowered_factors_are_equal():
    model, x, found = Block(), torch.randn(3, 5, 6), []
    for context in (fast_forward.prepared(model, "bf16"), fast_forward.fast_linears(model)):
        with context, fast_forward.running("bf16", x.device):
            y = model(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), model.expert.gate_weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0].float(), model(x), rtol=0.05, atol=0.05)


def test_attention_is_in_fp32_while_a_cpu_runs_in_bf16():
    q = torch.randn(2, 3, 7, 8).bfloat16()
    with fast_forward.running("bf16", q.device):
        y = F.scaled_dot_product_attention(q, q, value=q)
        assert (q @ q.mT).dtype == F.linear(q, q[0, 0]).dtype == torch.bfloat16
    torch.testing.assert_close(y, F.scaled_dot_product_attention(*3 * [q.float()]), rtol=1e-5, atol=1e-6)
    assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
