"""Adapters that do not fit a model, and arguments that are wrong, change nothing in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_adapters import LAYERS, Net, expert
from torch import nn

import mingle
from mingle import LowRankExpert, MingleLinear

# peft warns about most of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Which objects a model is made of, and their values."""
    parts = {name: id(part) for name, part in [*model.named_modules(), *model.named_parameters()]}
    return parts, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, int], dict[str, torch.Tensor]]) -> None:
    parts, values = snapshot(model)
    assert parts == before[0]
    assert all(torch.equal(values[name], value) for name, value in before[1].items())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"blocks.0.fc3": expert(12, 8)},
            "in 1 of 2 layers: 'blocks.0.fc3' is not in the model; did you mean 'blocks.0.fc[12]'",
        ),
        ({"fc1": expert(12, 8)}, "'fc1' is not in the model"),
        ({"": expert(12, 8)}, "'' is not in the model"),
        ({"conv": expert(8, 8)}, "'conv' is a Conv1d, not a torch.nn.Linear"),
        ({"blocks": expert(8, 8)}, "'blocks' is a ModuleList"),
        (
            {"embed": expert(6, 8)},
            r"'embed': A has shape \[2, 8\] and B \[6, 2\], expected \[r, 6\] and \[8, r\]",
        ),
        (
            {"embed": LowRankExpert(torch.randn(2, 6), torch.randn(8, 3))},
            r"'embed': A has shape \[2, 6\] and B \[8, 3\]",
        ),
        ({"embed": LowRankExpert(torch.randn(6), torch.randn(8, 6))}, r"'embed': A has shape \[6\]"),
        (
            {"embed": LowRankExpert(torch.randn(2, 6), torch.full((8, 2), torch.inf))},
            "'embed': B is not finite",
        ),
        ({f"blocks.{i}.fc1": expert(12, 8) for i in range(2, 10)}, "in 8 of 9 layers: .*; and 3 more"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(base, extra, message):
    mingle.add_adapter(base, {"blocks.1.fc1": expert(12, 8)})
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        mingle.add_adapter(base, {"blocks.0.fc1": expert(12, 8)} | extra)
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reduce="mean"), "reduce='mean'"),
        (dict(gate_bias=float("inf")), "gate_bias=inf"),
        (dict(adapter={}), "no experts"),
    ],
    ids=str,
)
def test_wrong_arguments_change_nothing(base, options, message):
    mingle.add_adapter(base, {"blocks.0.fc1": expert(12, 8)})
    before = snapshot(base)
    adapter = {"blocks.0.fc1": expert(12, 8), "blocks.0.fc2": expert(8, 12)}
    with pytest.raises(ValueError, match=message):
        mingle.add_adapter(base, **{"adapter": adapter, **options})
    assert_unchanged(base, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_on_the_way_changes_nothing(base, x, monkeypatch, error):
    adapter = {name: expert(*base.get_submodule(name).weight.shape) for name in LAYERS}
    mingle.add_adapter(base, {name: adapter[name] for name in LAYERS[:3]})
    before, output, add = snapshot(base), base(x), MingleLinear.add_expert
    calls = []

    def fails_late(layer: MingleLinear, *args: Any, **options: Any) -> None:
        add(layer, *args, **options)
        calls.append(layer)
        if len(calls) == 4:
            raise error("out of memory")

    monkeypatch.setattr(MingleLinear, "add_expert", fails_late)
    with pytest.raises(error):
        mingle.add_adapter(base, adapter)
    assert_unchanged(base, before)
    assert torch.equal(base(x), output)


def test_overflow_in_the_layers_dtype(saved):
    experts = {name: LowRankExpert(A=A, B=B * 1e6) for name, (A, B) in mingle.read_adapter(saved).items()}
    with pytest.raises(ValueError, match="B is not finite in the layer's torch.float16"):
        mingle.add_adapter(Net().half(), experts)


def test_layers_whose_owner_reads_their_weight_are_refused():
    class Special(nn.Linear):
        pass

    with pytest.raises(ValueError, match="'0' is a Special, not a torch.nn.Linear"):
        mingle.add_adapter(nn.Sequential(Special(4, 4)), {"0": expert(4, 4)})
    encoder = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(
        ValueError, match="'linear1' cannot take experts: torch.nn.TransformerEncoderLayer reads its weight"
    ):
        mingle.add_adapter(encoder, {"linear1": expert(8, 4)})
