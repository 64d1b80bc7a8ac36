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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_batches_are_the_batches_and_meet_few_samples(size, monkeypatch):
    batches = [torch.randperm(40)[:8] for _ in range(5)] + [torch.tensor([3, 9])]
    counts = torch.arange(40) % 4  # some samples have nothing to be counted
    monkeypatch.setattr(ranks, "size", lambda: size)
    taken, met = [], []
    for rank in range(size):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        used, shares = own_shares(batches, counts)
        assert len(used) >= 1 and used.equal(used.unique())
        taken.append([(used[share.samples], share.weight) for share in shares])
        met.append(len(used))
    for batch, shares in zip(batches, zip(*taken, strict=True), strict=True):
        assert torch.cat([own for own, _ in shares]).sort().values.equal(batch.sort().values)
        assert sum(weight for _, weight in shares) == pytest.approx(1)
        for own, weight in shares:
            assert weight == pytest.approx(int(counts[own].sum()) / int(counts[batch].sum()))
        assert max(len(own) for own, _ in shares) - min(len(own) for own, _ in shares) <= 1
        if size == 1:
            assert shares[0][0].equal(batch)  # in its own order
    assert sum(met) < 1.6 * len(torch.cat(batches).unique())
    _, shares = own_shares(batches, counts, whole=True)  # of the last one
    assert any(len(share.samples) for share in shares) == (size == 1)
