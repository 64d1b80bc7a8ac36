"""Data-parallel adaptation: gradients are reduced before they are projected, so that all processes and a
single one make the same step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys, torch, torch.distributed as dist
from torch import nn
from mingle import MingleLinear
from mingle.adaptation.optimizer import GateStep
from mingle.adaptation.projector import RelaxedProjector

rank, world, folder, case = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
broken = case == "broken"
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
torch.manual_seed(0)
layers = {}
for name, width in (("first", 6), ("second", 5)):
    layer = MingleLinear.from_linear(nn.Linear(width, 5))
    layer.requires_grad_(False)
    for _ in range(2):
        layer.add_expert(torch.randn(2, width), torch.randn(5, 2))
    layers[name] = layer
bases = {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
data = torch.randn(12, 8, 3, 6)
if case == "wrapped":  # by DistributedDataParallel, which reduces gradients by itself
    model = nn.Sequential(layers["first"], nn.Tanh(), layers["second"])
    trained = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    projector = RelaxedProjector(bases)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for batch in data:
        optimizer.zero_grad()
        trained(batch.chunk(world)[rank]).square().mean().backward()
        assert projector.apply_({name: layer.gate_weight.grad for name, layer in layers.items()})
        optimizer.step()
    gates = [gate.detach() for layer in layers.values() for gate in (layer.gate_weight, layer.gate_bias)]
    torch.save({"gates": gates, "S": projector.interferences}, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()
    sys.exit()
step = GateStep(layers, 0.05, RelaxedProjector(bases))
skipped = 0
for number, batch in enumerate(data):
    step.zero_grad()
    mine = batch.chunk(world)[rank]
    loss = layers["second"](torch.tanh(layers["first"](mine))).square().mean()
    loss.backward()
    if broken and number == 4 and rank == 0:
        step.views["second"].fill_(float("nan"))
    if world > 1:
        dist.all_reduce(step.gradients)
        step.gradients /= world
        loss = loss.detach()
        dist.all_reduce(loss)
    skipped += int(step.step(loss))
assert skipped == broken
found = {"gates": [gate.detach() for gate in step.gates], "S": step.projector.interferences}
torch.save(found, f"{folder}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="PyTorch without gloo",
)
@pytest.mark.parametrize("case", ["sound", "broken", "wrapped"])
def test_projecting_after_the_all_reduce_makes_two_processes_step_as_one(case, tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    runs = [(rank, world) for world in (1, 2) for rank in range(world)]
    commands = [
        [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path), case] for rank, world in runs
    ]
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for command in commands]
    for worker in workers:
        _, errors = worker.communicate(timeout=100)
        assert worker.returncode == 0, errors.decode()
    alone, *both = (torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank, world in runs)
    for mine in both:
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(both[0]["gates"], both[1]["gates"], strict=True))
    assert torch.equal(both[0]["S"], both[1]["S"])
