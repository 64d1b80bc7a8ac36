"""What is computed once before the first expert, and what is kept of it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import student
from torch import nn

from mingle.adaptation.losses import distillation
from mingle.adaptation.prefix_cache import frozen_prefix
from mingle.adaptation.teacher import teacher_answers
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks.clip import ClipTask


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(4, 2)
        self.calls = []
        for name, module in self.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, name=name: self.calls.append(name))

    def forward(self, x):
        hidden = self.norm(self.embed(x))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(self.norm(hidden))


def test_the_prefix_is_computed_once_and_changes_nothing():
    model, x = Tower().eval(), torch.randn(10, 3)
    expected = model(x)
    expert = model.blocks[1][0]
    with frozen_prefix(model, [expert], lambda part: model(x[part]), 10, 4) as select:
        for index in (torch.tensor([3, 1, 9]), torch.tensor([0])):
            select(index)
            model.calls.clear()
            torch.testing.assert_close(model(x[index]), expected[index])
            # `norm` comes back behind the expert: its second call has another input, so it is not kept
            assert "blocks.0.0" not in model.calls and "norm" in model.calls and "blocks.2.0" in model.calls
    model.calls.clear()
    torch.testing.assert_close(model(x), expected)
    assert "blocks.0.0" in model.calls


@pytest.mark.parametrize("budget", [0, 10 * 4 * 4 - 1])
def test_nothing_is_kept_beyond_the_budget(budget):
    model, x = Tower().eval(), torch.randn(10, 3)
    with frozen_prefix(model, [model.blocks[1][0]], lambda part: model(x[part]), 10, 4, budget) as select:
        select(torch.arange(10))
        model.calls.clear()
        model(x)
        assert "embed" in model.calls and "blocks.0.0" in model.calls


def test_a_model_without_experts_on_its_way_keeps_nothing():
    model, x = Tower().eval(), torch.randn(5, 3)
    unused = nn.Linear(2, 2)
    with frozen_prefix(model, [unused], lambda part: model(x[part]), 5, 5):
        assert "forward" not in vars(model.embed)


class Positions(nn.Module):
    """Tokens that are scaled by what belongs to their position."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x.unsqueeze(2) * self.positions(torch.arange(x.shape[1])))


@pytest.mark.parametrize("count", [1, 5])
def test_what_belongs_to_positions_is_not_taken_for_samples(count):
    """With as many tokens as samples both have as many rows."""
    model, x = Positions().eval(), torch.randn(count, 5)
    expected, index = model(x), torch.arange(count).flip(0)
    with frozen_prefix(model, [model.head], lambda part: model(x[part]), count, 5) as select:
        select(index)
        torch.testing.assert_close(model(x[index]), expected[index])


def test_adapting_with_and_without_the_prefix_gives_the_same_gates(
    base_model, tuned_states, samples, monkeypatch
):
    task, gates = ClipTask(), []
    for budget in (0, 2**30):
        monkeypatch.setattr(frozen_prefix.__wrapped__, "__defaults__", (budget,))
        model, layers = student(base_model, ("layers.1.self_attn.q_proj", "layers.1.mlp.fc1"))
        teacher = copy.deepcopy(base_model)
        teacher.vision_model.load_state_dict(tuned_states[0])
        targets = teacher_answers(task, teacher, samples[0], 24)
        adapt_gates(
            task,
            model,
            layers,
            samples[0],
            distillation(lambda _, targets=targets: targets, 2.0),
            AdaptConfig(steps=10, lr=1e-2),
            torch.Generator().manual_seed(0),
        )
        gates.append(torch.cat([layer.gate_weight.flatten() for layer in layers.values()]))
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-6)
