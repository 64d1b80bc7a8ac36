"""Merging models whose experts are packed: as if every expert's matrix were a tensor of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from bare_methods import BareTask, merged, tuned_states
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mingle import linalg
from mingle.merging.finetuned import FineTuned
from mingle.methods.nufilt import NufiltOptions, updates
from mingle.methods.opcm import split_rank

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NUFILT = dict(r_p=3, r_v=2, r_l=4, steps=10)
SIZES = dict(
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=32,
)
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, **SIZES)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES)),
}


@pytest.fixture(params=MODELS, scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind):
    torch.manual_seed(0)
    return MODELS[kind]().double().eval()


@pytest.fixture(scope="module")
def states(base):
    """Three fine-tuned models; the second left expert 1 of every layer as it was."""
    states, before = tuned_states(base), base.state_dict()
    for name, tensor in states[1].items():
        if tensor.dim() == 3:
            tensor[1] = before[name][1]
    return states


@pytest.fixture(scope="module")
def apart(kind):
    """A state with one matrix [d_out, d_in] per expert; gpt-oss keeps them the other way round."""

    def split(state):
        found = {}
        for name, tensor in state.items():
            if tensor.dim() == 3:
                turned = tensor.mT if kind == "gpt-oss" else tensor
                found |= {f"{name}.{i}": matrix for i, matrix in enumerate(turned)}
            else:
                found[name] = tensor
        return found

    return split


@pytest.fixture(scope="module")
def linear(base, apart):
    """The names of all matrices that linear layers multiply by."""
    names = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: tensor for name, tensor in base.state_dict().items() if tensor.dim() == 3}
    return names | apart(packed).keys()


def assert_same(found, expected):
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-9 * tensor.norm(), name


def norm(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).norm()


def project(delta, merged, drop_diagonal):
    """Each matrix by itself, with all of the other one's singular vectors."""
    if delta.dim() > 2:
        return torch.stack([project(*pair, drop_diagonal) for pair in zip(delta, merged, strict=True)])
    U, S, Vh = linalg.gram_svd(merged)
    return linalg.project_out(delta, U, S, Vh, split_rank(S, 0.5), drop_diagonal=drop_diagonal)


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_opcm(base, states, apart, linear, drop_diagonal):
    method = merged("opcm", base, states, drop_diagonal=drop_diagonal)
    start, vector, norms, scale = apart(base.state_dict()), {}, [], 1.0
    for tuned in map(apart, states):
        delta = {name: tuned[name] - tensor for name, tensor in start.items()}
        norms.append(norm(delta))
        if not vector:
            vector = delta
            continue
        raw = {
            name: scale * vector[name] + (project(d, vector[name], drop_diagonal) if name in linear else d)
            for name, d in delta.items()
        }
        scale = norm(raw) / (sum(norms) / len(norms))
        vector = {name: tensor / scale for name, tensor in raw.items()}
    assert_same(apart(method.merged), {name: tensor + vector[name] for name, tensor in start.items()})
    assert_same(apart(method.model.state_dict()), apart(method.merged))


def test_opcm_projects_experts(base, states):
    """Or the test above could pass without a projection anywhere."""
    found, without = (merged("opcm", base, states, alpha=alpha).merged for alpha in (0.5, 0.0))
    packed = [name for name, tensor in found.items() if tensor.dim() == 3]
    assert len(packed) == 4
    assert all(not torch.allclose(found[name], without[name], atol=1e-4) for name in packed)


def test_nufilt(base, states, apart, linear):
    method = merged("nufilt", base, states, **NUFILT)
    names = {name for name in linear if "lm_head" not in name}
    start = {name: tensor for name, tensor in apart(base.state_dict()).items() if name in names}
    total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for seed, tuned in enumerate(map(apart, states)):
        deltas = {name: tuned[name] - tensor for name, tensor in start.items()}
        added = updates(deltas, total, NufiltOptions(**NUFILT), seed)
        total = {name: total[name] + added[name] for name in start}
    found = apart(method.merged)
    assert_same(found, {name: tensor + total[name] for name, tensor in start.items()})
    assert all(torch.equal(found[n], t) for n, t in apart(base.state_dict()).items() if n not in names)


def test_nufilt_on_chosen_experts(base, states):
    method = merged("nufilt", base, states, layers=("experts.down_proj",), **NUFILT)
    expected = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    before, after = base.state_dict(), method.model.state_dict()
    assert method.merges() == expected
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == expected


def test_gated_methods_leave_them_to_the_base_and_say_so(base, states):
    method = merged("mingle", base, states[:1], gates="static", rank=2)
    layers = {f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ATTENTION}
    assert set(method.merges()) == layers
    (line,) = FineTuned(states[0], base, BareTask()).left(method.merges())
    assert line.startswith("changed by fine-tuning and left as in the base: ")
    assert "model.layers.*.mlp.experts.gate_up_proj (2 tensors)" in line


def test_of_experts_alone_the_line_names_just_them(base):
    tuned = copy.deepcopy(base.state_dict())
    for tensor in tuned.values():
        if tensor.dim() == 3:
            tensor += 1
    (line,) = FineTuned(tuned, base, BareTask()).left([])
    experts = [f"model.layers.*.mlp.experts.{part}_proj (2 tensors)" for part in ("gate_up", "down")]
    assert line == f"changed by fine-tuning and left as in the base: {', '.join(experts)}"
