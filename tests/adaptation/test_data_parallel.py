"""Data-parallel adaptation: gradients are reduced before they are projected, so that all processes and a
single one make the same step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import world

from mingle import MingleLinear, ranks
from mingle.adaptation.batches import own_shares
from mingle.adaptation.optimizer import GateStep
from mingle.adaptation.projector import RelaxedProjector


def steps(case):
    """The gates and S after twelve steps of this process, or of its group."""
    torch.manual_seed(0)
    layers = {}
    for name, width in (("first", 6), ("second", 5)):
        layer = MingleLinear.from_linear(nn.Linear(width, 5))
        layer.requires_grad_(False)
        for _ in range(2):
            layer.add_expert(torch.randn(2, width), torch.randn(5, 2))
        layers[name] = layer
    bases = {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
    data, model = torch.randn(12, 8, 3, 6), nn.Sequential(layers["first"], nn.Tanh(), layers["second"])
    trained = model
    projector = RelaxedProjector(bases)
    if case == "wrapped":  # by DistributedDataParallel, which reduces gradients by itself
        if ranks.size() > 1:
            trained = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    else:
        step = GateStep(layers, 0.05, projector)
    skipped = 0
    for number, batch in enumerate(data):
        model.zero_grad(set_to_none=False)
        loss = trained(batch[ranks.shared(len(batch))]).square().mean()
        if case == "wrapped":
            loss.backward()
            assert projector.apply_({name: layer.gate_weight.grad for name, layer in layers.items()})
            optimizer.step()
            continue
        loss = loss / ranks.size()  # its part of the mean
        loss.backward()
        if case == "broken" and number == 4 and ranks.rank() == 0:
            step.views["second"].fill_(float("nan"))
        skipped += int(step.step(loss))
    assert skipped == (case == "broken")
    gates = [gate.detach() for layer in layers.values() for gate in (layer.gate_weight, layer.gate_bias)]
    return gates, projector.interferences


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="PyTorch without gloo",
)
@pytest.mark.parametrize("case", ["sound", "broken", "wrapped"])
def test_projecting_after_the_all_reduce_makes_two_processes_step_as_one(case):
    alone, both = steps(case), world(2, lambda: steps(case))
    for mine in both:
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(both[0][0], both[1][0], strict=True))
    assert torch.equal(both[0][1], both[1][1])


def shares_of_all(monkeypatch, size, batches, counts, **options):
    """By process, what it takes of every batch: pass by pass, sample numbers and weight."""
    monkeypatch.setattr(ranks, "size", lambda: size)
    taken = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        used, shares = own_shares(batches, counts, **options)
        assert len(used) >= 1 and used.equal(used.unique())
        taken.append([[(used[part.samples], part.weight) for part in passes] for passes in shares])
    return taken


@pytest.mark.parametrize("at_once", [None, 2, 3, 20])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_batches_are_the_batches_and_meet_few_samples(size, at_once, monkeypatch):
    batches = [torch.randperm(40)[:8] for _ in range(6)]
    counts = torch.arange(40) % 4  # some samples have nothing to be counted
    taken = shares_of_all(monkeypatch, size, batches, counts, at_once=at_once)
    for batch, shares in zip(batches, zip(*taken, strict=True), strict=True):
        assert len({len(passes) for passes in shares}) == 1
        passes = [part for own in shares for part in own]
        assert max(len(samples) for samples, _ in passes) <= (at_once or 8)
        assert sum(weight for _, weight in passes) == pytest.approx(1)
        for samples, weight in passes:
            assert weight == pytest.approx(int(counts[samples].sum()) / int(counts[batch].sum()))
        own = [torch.cat([samples for samples, _ in share]) for share in shares]
        assert torch.cat(own).sort().values.equal(batch.sort().values)
        assert max(map(len, own)) - min(map(len, own)) <= 1
        if size == 1:
            assert own[0].equal(batch)  # in its own order
    met = sum(len(torch.cat([part[0] for share in one for part in share]).unique()) for one in taken)
    assert met < 1.6 * len(torch.cat(batches).unique())


@pytest.mark.parametrize("whole", [False, True])
def test_a_process_without_a_share_takes_a_sample_that_does_not_count(whole, monkeypatch):
    taken = shares_of_all(monkeypatch, 3, [torch.tensor([3, 9])], torch.ones(10), whole=whole)
    passes = [part for ((part,),) in taken]
    assert [samples.tolist() for samples, weight in passes if not weight] == [[3]] * (2 if whole else 1)
    assert [weight for _, weight in passes if weight] == ([1.0] if whole else [0.5, 0.5])
    assert not whole or passes[0][1] == 1  # the first process has all
