"""A part of a model that computes once for several passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mingle.nn.replay import replayed


class Twice(nn.Module):
    """Calls its part two times in a pass, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.calls = nn.Linear(3, 3), 0
        self.part.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) + 2 * self.part(-x)


@pytest.mark.parametrize("name", ["part", "", None])
def test_a_part_gives_again_what_it_gave_in_the_first_pass(name):
    model, x = Twice(), torch.randn(2, 3)
    expected = model(x)
    model.calls = 0
    with replayed(model, name) as replay:
        assert torch.equal(model(x), expected)
        assert isinstance(model.part, nn.Linear) and str(type(model.part)) == str(nn.Linear)
        for _ in range(2):
            replay.again()
            assert torch.equal(model(x if name is None else torch.zeros(2, 3)), expected)
    assert model.calls == (6 if name is None else 2)
    assert type(model) is Twice and type(model.part) is nn.Linear
    assert torch.equal(model(x), expected)
    assert not torch.equal(model(x + 1), expected)


def test_a_part_whose_layers_are_called_one_by_one_stays_as_it_is():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model, x = nn.ModuleDict({"layers": layers}), torch.randn(2, 3)
    with replayed(model, "layers") as replay:
        for value in (x, -x):
            replay.again()
            found = value
            for layer in model["layers"]:
                found = layer(found)
            assert len(model["layers"]) == 2 and torch.equal(found, model["layers"][0](value).tanh())


def test_one_recording_may_stand_in_another():
    model, x = Twice(), torch.randn(2, 3)
    expected = model(x)
    model.calls = 0
    with replayed(model, "part") as outer:
        model(x)
        for _ in range(2):
            outer.again()
            with replayed(model, "part") as inner:
                for _ in range(3):
                    inner.again()
                    assert torch.equal(model(x), expected)
    assert model.calls == 2


def test_the_model_is_as_before_after_an_error():
    model = Twice()
    with pytest.raises(RuntimeError), replayed(model, "part"):
        model(torch.randn(2, 4))
    assert type(model.part) is nn.Linear
