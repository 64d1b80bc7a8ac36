"""The leading directions of a stream of input vectors."""

from __future__ import annotations

import pytest
import torch
from worlds import world

from mingle import linalg, ranks
from mingle.adaptation import input_directions
from mingle.adaptation.input_directions import collected, crowded, extended, of_all, with_leading
from mingle.linalg import subspace


def stream(d, count=600, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, d, generator=generator) @ torch.diag(
        torch.arange(1, d + 1, dtype=torch.float32) ** -0.7
    )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0])
def test_input_directions_are_those_of_all_vectors_together(dtype, limit, offset):
    x = (stream(20) + offset).to(dtype)  # with a mean that outweighs all else by up to 1e4
    nothing = linalg.InputDirections(20)
    parts = nothing.including(x[:100].view(4, 25, 20)).including(x[100:]).including(x[:0])
    squared = x.double().mT @ x.double()
    found, exact = parts.top(3), linalg.top_subspace(squared, 3)
    values = torch.linalg.eigvalsh(squared).flip(0)
    rounding = torch.finfo(torch.float64).eps * values[0] / (values[:3] - values[1:4]).min()
    assert (found - exact).norm(dim=0).max() <= max(limit, rounding)  # each direction by itself
    assert nothing.statistic is None and nothing.top(3).shape == (20, 0)
    with pytest.raises(ValueError, match="width 19, expected 20"):
        nothing.including(x[:, 1:])


@pytest.mark.slow
def test_a_wide_stream_is_sketched(monkeypatch):
    monkeypatch.setattr(subspace, "WIDE", 64)
    x = stream(400, count=2000)
    directions = linalg.InputDirections(400)
    for part in x.split(333):
        directions = directions.including(part)
    assert directions.statistic.shape == (256, 400)
    exact = linalg.top_subspace(x.double().mT @ x.double(), 3)
    found = directions.top(3)
    torch.testing.assert_close(found.mT @ found, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.svdvals(exact.mT @ found).min() > 1 - 1e-4
    lost = x.double().mT @ x.double() - directions.statistic.mT @ directions.statistic
    assert (
        torch.linalg.eigvalsh(lost).min() > -1e-9
        and torch.linalg.matrix_norm(lost, 2) < x.double().square().sum() / 256
    )
    few = linalg.InputDirections(400).including(x[:2])
    assert few.top(3).shape == (400, 2)


def test_a_wide_stream_of_few_directions_is_sketched_too(monkeypatch):
    monkeypatch.setattr(subspace, "WIDE", 64)
    x = torch.cat([stream(80, count=400), torch.zeros(400, 40)], 1)
    found = linalg.InputDirections(120).including(x[:300]).including(x[300:]).top(3)
    exact = linalg.top_subspace(x.double().mT @ x.double(), 3)
    assert torch.linalg.svdvals(exact.mT @ found).min() > 1 - 1e-9


def test_layers_that_share_their_inputs_share_what_is_kept_of_them():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.late, self.out = (torch.nn.Linear(6, 6) for _ in range(4))

        def forward(self, x, everything):
            y = self.q(x) + self.k(x)
            return self.out(y + self.late(x) if everything else y)

    model, x = Model(), torch.randn(3, 4, 6)
    layers = dict(model.named_children())
    with collected(layers) as seen, torch.no_grad():
        model(x, everything=False)
        model(x + 1, everything=True)
    assert seen["q"] is seen["k"]
    assert seen["late"] is not seen["q"] and seen["out"] is not seen["q"]
    both, second = torch.cat([x, x + 1]).flatten(0, -2).double(), (x + 1).flatten(0, -2).double()
    torch.testing.assert_close(seen["q"].statistic, both.mT @ both, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["late"].statistic, second.mT @ second, rtol=1e-5, atol=1e-5)
    bases = with_leading({name: torch.zeros(6, 0) for name in layers}, seen, 2)
    assert all(basis.shape == (6, 2) for basis in bases.values())


def test_fewer_samples_than_k_give_as_many_directions_as_there_are():
    directions = linalg.InputDirections(20).including(stream(20, count=2))
    bases = {"a": torch.empty(20, 0)}
    for samples in (2, 2):  # the very same ones again add nothing
        bases = with_leading(bases, {"a": directions}, 3)
        assert bases["a"].shape == (20, samples)
    torch.testing.assert_close(bases["a"].mT @ bases["a"], torch.eye(2))


def test_a_basis_that_saturates_is_capped_and_named_with_what_is_left():
    bases = {"narrow": torch.empty(4, 0), "wide": torch.empty(20, 0)}
    for seed in range(3):
        seen = {
            name: linalg.InputDirections(len(basis)).including(stream(len(basis), seed=seed))
            for name, basis in bases.items()
        }
        bases = with_leading(bases, seen, 3)
        assert crowded(bases, 3) == (
            f"few input directions are left to later tasks in narrow ({max(0, 1 - seed)} of 4 left)"
        )
    assert bases["narrow"].shape == (4, 4)
    assert bases["wide"].shape == (20, 9)


def test_what_processes_have_seen_is_added_up_the_same_in_each(monkeypatch):
    """Sums are, and sketches; of three processes the last sees nothing, and one layer only the first."""
    monkeypatch.setattr(subspace, "WIDE", 64)
    layers = {
        name: torch.nn.Linear(width, 2) for name, width in (("q", 6), ("k", 6), ("late", 6), ("wide", 80))
    }
    x, wide = stream(6), stream(80)

    def work():
        first = 200 * ranks.rank()
        own = slice(first, 400 if ranks.size() == 1 else first + 200)
        with collected(layers) as seen, torch.no_grad():
            if ranks.rank() < 2:
                layers["q"](x[own])
                layers["k"](x[own])
                layers["wide"](wide[own])
            if ranks.rank() == 0:
                layers["late"](x[:100])
        found = of_all(layers, seen)
        assert found["q"] is not found["late"]
        bases = with_leading({name: torch.zeros(found[name].width, 0) for name in found}, found, 2)
        return {name: (own.statistic, own.count, bases[name]) for name, own in found.items()}

    alone, (first, *others) = work(), world(3, work)
    assert list(first) == list(alone)
    for name, (statistic, count, basis) in first.items():
        for other in others:
            assert torch.equal(statistic, other[name][0]) and torch.equal(basis, other[name][2])
        assert count == alone[name][1] == (100 if name == "late" else 400)
        assert torch.linalg.svdvals(basis.mT @ alone[name][2]).min() > 1 - 1e-4
    for name in ("q", "late"):
        torch.testing.assert_close(first[name][0], alone[name][0], rtol=1e-5, atol=1e-4)


def test_directions_of_layers_in_turn_are_those_of_all_at_once(monkeypatch):
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((6, 9), (9, 5), (5, 6))))
    layers, x, runs = dict(model.named_children()), torch.randn(40, 6), []
    bases = {name: torch.empty(layer.in_features, 0) for name, layer in layers.items()}

    def run():
        runs.append(model(x))

    with torch.no_grad():
        at_once = extended(bases, layers, run, 2)
        assert len(runs) == 1 and {basis.shape[1] for basis in at_once.values()} == {2}
        monkeypatch.setattr(input_directions, "BUDGET", 8 * (6 * 6 + 9 * 9))
        in_turn = extended(bases, layers, run, 2)
    assert len(runs) == 3  # the first two layers, and the last one
    assert at_once.keys() == in_turn.keys() and all(map(torch.equal, at_once.values(), in_turn.values()))
