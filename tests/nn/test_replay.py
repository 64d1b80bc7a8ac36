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
        self.part.width = 3
        self.part.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) + 2 * self.part(-x)


@pytest.mark.parametrize("name", ["part", "", None])
def test_a_part_gives_again_what_it_gave_in_the_first_pass(name):
    model, x = Twice(), torch.randn(2, 3)
    part, expected = model.part, model(x)
    model.calls = 0
    with replayed(model, name) as replay:
        assert torch.equal(replay.model(x), expected)
        assert replay.model.part.width == 3
        for _ in range(2):
            replay.again()
            assert torch.equal(replay.model(x if name is None else torch.zeros(2, 3)), expected)
    assert model.calls == (6 if name is None else 2)
    assert model.part is part
    assert torch.equal(model(x), expected)


def test_the_model_is_as_before_after_an_error():
    model = Twice()
    part = model.part
    with pytest.raises(RuntimeError), replayed(model, "part") as replay:
        replay.model(torch.randn(2, 4))
    assert model.part is part
