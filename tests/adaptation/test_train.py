"""The adaptation loop's parts: the step on flat gradients, and what is computed once before the first expert."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mingle import MingleLinear, inject
from mingle.adaptation import train as adapt
from mingle.adaptation.batches import drawn, shuffled_batches
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.adaptation.losses import distillation, entropy, entropy_loss
from mingle.adaptation.optimizer import GateStep
from mingle.adaptation.prefix_cache import frozen_prefix
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.teacher import teacher_logits
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.tasks.clip import ClipTask


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
def test_a_step_that_is_not_finite_changes_nothing(where):
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
    expected = (
        0.5 * layer.gate_weight.grad.new_ones(1) / 2
    )  # |G u| / ‖G‖ = 1/2 for equal entries, whatever their size
    torch.testing.assert_close(step.projector.interferences, expected)


# --- the prefix ---


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
        torch.manual_seed(0)
        model = copy.deepcopy(base_model).requires_grad_(False)
        layers = inject(model.vision_model, ("layers.1.self_attn.q_proj", "layers.1.mlp.fc1"))
        for layer in layers.values():
            layer.add_expert(
                torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1
            )
        teacher = copy.deepcopy(base_model)
        teacher.vision_model.load_state_dict(tuned_states[0])
        targets = teacher_logits(task, teacher, samples[0], 24)
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


def test_bf16_products_with_fp32_gates(base_model, tuned_states, samples):
    task, gates = ClipTask(), []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = copy.deepcopy(base_model).requires_grad_(False)
        layers = inject(model.vision_model, ("q_proj", "fc1"))
        for layer in layers.values():
            layer.add_expert(
                torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1
            )
        targets = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
        loss = distillation(lambda _, targets=targets: targets, 2.0)
        config = AdaptConfig(steps=10, lr=1e-2, precision=precision)
        trace = adapt_gates(task, model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
        assert all(layer.gate_weight.dtype == torch.float32 for layer in layers.values())
        gates.append(trace.loss)
    assert gates[0] != gates[1]
    torch.testing.assert_close(torch.tensor(gates[0]), torch.tensor(gates[1]), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="precision='fp8': expected one of fp32, bf16"):
        AdaptConfig(precision="fp8")


@pytest.mark.parametrize("interval", [1, 4, 8])
def test_steps_that_are_skipped_between_two_looks_are_named(
    base_model, samples, monkeypatch, caplog, interval
):
    monkeypatch.setattr(adapt, "_INTERVALS", {"cpu": interval})
    model, layers = student(base_model)
    names, poisoned, steps = list(layers), {2: 0, 5: 1, 6: 0}, iter(range(1, 100))

    def poison(step, loss, real=GateStep.step):
        layer = poisoned.get(next(steps))
        if layer is not None:
            step.views[names[layer]][0, 0] = math.nan
        return real(step, loss)

    monkeypatch.setattr(GateStep, "step", poison)
    targets, config = torch.randn(24, 5), AdaptConfig(steps=9)
    loss = distillation(lambda _: targets, 2.0)
    adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert told == [
        f"skipped step {i}: the gate gradient is not finite in {names[layer]}"
        for i, layer in poisoned.items()
    ]
    poisoned.update({11: 0, 12: 0, 13: 1, 14: 1})
    # the tenth call begins a new adaptation
    with pytest.raises(AdaptationDiverged, match="3 steps, last at step 4"):
        adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))


def student(base_model, targets=("q_proj", "fc1")):
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, targets)
    for layer in layers.values():
        layer.add_expert(torch.randn(4, layer.in_features) * 0.1, torch.randn(layer.out_features, 4) * 0.1)
    return model, layers


def test_the_teacher_answers_only_for_samples_that_are_used(base_model, samples):
    asked, gates = [], []
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))

    def teacher(seeds):
        asked.append(seeds)
        places = [next(i for i, known in enumerate(samples[0].inputs["pixel_values"]) if torch.equal(known, one)) for one in
                  seeds.inputs["pixel_values"]]  # fmt: skip
        return logits[places]

    used, _ = drawn(24, 5, 3, torch.Generator().manual_seed(0))
    for answers in (lambda _: logits[used], teacher):
        model, layers = student(base_model)
        loss, config = distillation(answers, 2.0), AdaptConfig(steps=3, batch_size=5, lr=1e-2)
        adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator().manual_seed(0))
        gates.append(torch.cat([layer.gate_weight.flatten() for layer in layers.values()]))
    assert [len(seeds) for seeds in asked] == [15]
    assert torch.equal(*gates)
    config = AdaptConfig(steps=0)
    trace = adapt_gates(ClipTask(), model, layers, samples[0], loss, config, torch.Generator())
    assert trace.loss == [] and len(asked) == 1


def test_the_batches_are_those_that_all_samples_would_give(base_model, samples, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ClipTask,
        "logits",
        lambda self, model, data, real=ClipTask.logits: seen.append(data) or real(self, model, data),
    )
    model, layers = student(base_model)
    config = AdaptConfig(steps=3, batch_size=5)
    adapt_gates(ClipTask(), model, layers, samples[0], entropy, config, torch.Generator().manual_seed(3))
    batches = shuffled_batches(24, 5, torch.Generator().manual_seed(3))
    for data, index in zip(seen[-3:], batches, strict=False):
        assert torch.equal(data.inputs["pixel_values"], samples[0].inputs["pixel_values"][index])


def test_entropy_of_the_rows_that_count():
    logits = torch.randn(4, 3, 7, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(logits, -1)
    rows = -(p * p.log()).sum(-1)
    torch.testing.assert_close(entropy_loss(logits), rows.mean())
    valid = torch.rand(4, 3) > 0.5
    loss = entropy_loss(logits, valid)
    torch.testing.assert_close(loss, rows[valid].mean())
    loss.backward()
    assert not logits.grad[~valid].any() and logits.grad[valid].any(-1).all()
    assert entropy_loss(torch.tensor([[1e4, 0.0]])) == 0


def test_without_a_teacher_the_entropy_falls(base_model, samples):
    torch.manual_seed(0)
    model = copy.deepcopy(base_model).requires_grad_(False)
    layers = inject(model.vision_model, ("q_proj", "fc1"))
    for layer in layers.values():
        for _ in range(2):
            layer.add_expert(
                torch.randn(4, layer.in_features) * 0.1,
                torch.randn(layer.out_features, 4) * 0.1,
                gate_bias=0.3,
            )
        layer.set_trainable_gates(2)
    before = entropy_loss(ClipTask().logits(model, samples[0])).item()
    config = AdaptConfig(steps=20, lr=1e-2, batch_size=24)
    trace = adapt_gates(
        ClipTask(), model, layers, samples[0], entropy, config, torch.Generator().manual_seed(0)
    )
    assert trace.loss[0] == pytest.approx(before, rel=1e-5)
    assert entropy_loss(ClipTask().logits(model, samples[0])).item() < trace.loss[-1] < before - 1e-3
