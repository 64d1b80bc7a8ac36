"""A merge of GPT-2s is that of the same models with ordinary linear layers, transposed back."""

from __future__ import annotations

import copy

import pytest
import torch
from bare_methods import merged, tuned_states
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from mingle.methods import METHODS
from mingle.methods.base import WeightMethod
from mingle.nn.linear import MingleLinear
from mingle.tasks import TaskData

OPTIONS = {
    "opcm": [{}, {"drop_diagonal": True}],
    "nufilt": [dict(r_p=3, r_v=2, r_l=4, steps=10)],
}
WEIGHT_METHODS = [name for name, method in METHODS.items() if issubclass(method, WeightMethod)]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=24, n_positions=8)
    return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(scope="module")
def twin(gpt2):
    """The same model with `nn.Linear` in place of every Conv1D."""
    model = copy.deepcopy(gpt2)
    for name, module in gpt2.named_modules():
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, dtype=module.weight.dtype)
            linear.load_state_dict({"weight": module.weight.T, "bias": module.bias})
            model.set_submodule(name, linear)
    return model


@pytest.fixture(scope="module")
def states(gpt2):
    return tuned_states(gpt2)


@pytest.fixture(scope="module")
def turned(gpt2):
    """Transposes the weights of a state that Conv1Ds keep the other way round than linear layers."""
    conv = {f"{name}.weight" for name, module in gpt2.named_modules() if isinstance(module, Conv1D)}
    return lambda state: {name: t.mT.contiguous() if name in conv else t for name, t in state.items()}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(24, (6, 5), generator=torch.Generator().manual_seed(0))


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize(
    ("method", "options"), [(name, options) for name in WEIGHT_METHODS for options in OPTIONS.get(name, [{}])]
)
def test_weight_methods(gpt2, twin, states, turned, method, options):
    ours = merged(method, gpt2, states, **options)
    plain = merged(method, twin, [turned(state) for state in states], **options)
    assert_same(turned(ours.plain_tower()), plain.plain_tower())
    assert_same(turned(ours.model.state_dict()), plain.model.state_dict())
    assert set(ours.merges()) == set(plain.merges())


def test_opcm_takes_directions_out_of_a_conv1d(gpt2, states):
    """Δ without the block of M's leading directions, in the tensor as GPT-2 has it."""
    name = "transformer.h.0.mlp.c_fc.weight"
    found = merged("opcm", gpt2, states[:2])
    base = gpt2.state_dict()
    M, delta = (state[name] - base[name] for state in states[:2])
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    s = int((S.cumsum(0) <= 0.5 * S.sum()).sum())
    assert 0 < s < len(S)
    kept = delta - U[:, :s] @ (U[:, :s].T @ delta @ Vh[:s].T) @ Vh[:s]
    torch.testing.assert_close(found.merged[name], base[name] + (M + kept) / found.state["scale"])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mingle", dict(gates="static", rank=3)),
        ("mingle", dict(rank=3, steps=2, lr=0.1)),
        ("mingle-seq", dict(rank=3, steps=2, start="previous")),
        ("wemoe", dict(rank=3, later_rank=2, steps=2, lr=0.1)),
    ],
)
def test_gated_methods(gpt2, twin, states, turned, tokens, method, options):
    seeds = TaskData({"input_ids": tokens})
    ours = merged(method, gpt2, states, seeds, **options)
    plain = merged(method, twin, [turned(state) for state in states], seeds, **options)
    for name, layer in ours.layers.items():
        for mine, other in zip(layer.experts(), plain.layers[name].experts(), strict=True):
            torch.testing.assert_close(mine.delta(), other.delta())
    found, expected = ours.model(tokens).logits, plain.model(tokens).logits
    assert (found - gpt2(tokens).logits).norm() > 1e-3 * found.norm()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_static_gates_fold_into_a_plain_gpt2(gpt2, states, tokens):
    method = merged("mingle", gpt2, states, gates="static", rank=3)
    plain = copy.deepcopy(gpt2)
    plain.load_state_dict(method.plain_tower())
    torch.testing.assert_close(plain(tokens).logits, method.model(tokens).logits)


def test_a_gated_merge_is_restored(gpt2, states, tokens):
    method = merged("mingle", gpt2, states, gates="static", rank=3)
    again = merged("mingle", gpt2, [], gates="static", rank=3)
    again.restore([method.task_tensors(i) for i in range(3)], method.state_tensors())
    assert all(isinstance(again.tower.get_submodule(name), MingleLinear) for name in again.layers)
    assert torch.equal(again.model(tokens).logits, method.model(tokens).logits)
