"""The published procedure, written a second time from the paper: each forward adds dense experts to weights.

What it shares with this library is how a batch becomes logits, the names of the options, and the gates and
batches that our seeds make; no kernel, no layer, no decomposition.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.adaptation.batches import shuffled_batches
from mingle.bench.decomposition.peers import without_leading
from mingle.bench.machine import Stopwatch
from mingle.bench.merges.agreement import Experts, Gates
from mingle.bench.merges.cases import MergeProblem, Tuned
from mingle.methods.mingle import MingleOptions
from mingle.nn.linear import GATE_INIT_STD
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.tasks import TaskData


class MergedLinear(nn.Module):
    """y = x (W₀ + Σ_i g_i B_i A_i)ᵀ + b: one merged weight for the whole batch, or one for every sample."""

    def __init__(self, linear: nn.Linear, per_batch: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.per_batch = linear.weight, linear.bias, per_batch
        self.experts: list[LowRankExpert] = []
        self.gates = nn.ModuleList()
        self.basis = torch.empty(linear.in_features, 0, dtype=linear.weight.dtype)  # stays on the CPU
        self.covariance: Tensor | None = None  # Σ xᵀx [d_in, d_in], while `PublishedMerge.protect` runs

    @torch.no_grad()
    def add_expert(self, A: Tensor, B: Tensor, gate_weight: Tensor, gate_bias: float | Tensor = 0.0) -> None:
        """A [r, d_in], B [d_out, r]; all older gates freeze."""
        self.gates.requires_grad_(False)
        gate = nn.Linear(A.shape[1], 1).to(self.weight)
        gate.weight.copy_(gate_weight)
        gate.bias.fill_(gate_bias)
        self.experts.append(LowRankExpert(A.to(self.weight), B.to(self.weight)))
        self.gates.append(gate)

    def dense_experts(self) -> list[Tensor]:
        """B_i A_i [d_out, d_in]."""
        return [B @ A for A, B in self.experts]

    def merged(self, gates: Tensor) -> Tensor:
        """W₀ + Σ_i g_i B_i A_i for gates [T]."""
        terms = zip(gates, self.dense_experts(), strict=True)
        return sum((gate * expert for gate, expert in terms), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.covariance is not None:
            rows = x.flatten(0, -2)
            self.covariance += rows.T @ rows
        of_tokens = torch.cat([gate(x) for gate in self.gates], -1)  # [n, tokens, T]
        gates = of_tokens.mean(1)
        if self.per_batch:
            return F.linear(x, self.merged(gates.mean(0)), self.bias)
        pairs = zip(x, gates, strict=True)
        return torch.stack([F.linear(tokens, self.merged(row), self.bias) for tokens, row in pairs])


class PublishedMerge:
    """A continual merge as published, task after task: a `mingle.bench.merges.contenders.Contender`.

    Raises:
        ValueError: an option that the published procedure does not have.
    """

    def __init__(self, problem: MergeProblem, clock: Stopwatch, options: Mapping[str, Any]) -> None:
        self.clock, self.task, self.count = clock, problem.task, 0
        self.options = o = MingleOptions(**{k: v for k, v in options.items() if k != "backend"})
        if (o.gates, o.precision) != ("newest", "fp32") or o.constraint == "none" or o.reduce == "token":
            known = "trains the newest gate in fp32, constrained, with gates of a batch or a sample"
            raise ValueError(f"the published procedure {known}")
        self.gamma = o.gamma if o.constraint == "relaxed" else 0.0
        self.layers: dict[str, MergedLinear] = {}
        with clock("load"):
            self.base = problem.module().to(clock.device)
            self.model = copy.deepcopy(self.base).eval().requires_grad_(False)
            suffixes = tuple(f".{s}" for s in o.layers or self.task.structure(self.model).sets["full"])
            tower = self.model.get_submodule(self.task.tower(self.model))
            for name, module in [item for item in tower.named_modules() if item[0].endswith(suffixes)]:
                assert isinstance(module, nn.Linear)
                self.layers[name] = MergedLinear(module, o.reduce == "batch")
                tower.set_submodule(name, self.layers[name])

    def restore(self, history: Sequence[Mapping[str, Tensor]]) -> None:
        keys = ("A", "B", "gate_weight", "gate_bias", "basis")
        for tensors in history:
            for name, layer in self.layers.items():
                *expert, basis = (tensors[f"{name}.{key}"].clone() for key in keys)
                layer.add_expert(*expert)
                layer.basis = torch.cat([layer.basis, basis], 1)
        self.count += len(history)

    def add(
        self, expert: Tuned, seeds: TaskData, given: Experts | None = None, *, protect: bool = True
    ) -> list[float]:
        tuned, options = self._load(expert), self.options
        generator = torch.Generator().manual_seed(zlib.crc32(f"0/{self.count}".encode()))
        gates = {name: torch.zeros(layer.weight.shape[1]) for name, layer in self.layers.items()}
        for gate in gates.values() if options.gate_init == "normal" else ():
            gate.normal_(std=GATE_INIT_STD, generator=generator)
        for name, (A, B) in (given or self.make_experts(tuned, self.layers)).items():
            self.layers[name].add_expert(A, B, gates[name])
        batches = islice(shuffled_batches(len(seeds), options.batch_size, generator), options.steps)
        with self.clock("adapt"):
            marks = self._adapt(tuned, seeds, batches)
        if protect:
            with self.clock("subspace"):
                self.protect(seeds)
        self.count += 1
        return [end - start for start, end in pairwise(marks)]

    def _load(self, expert: Tuned) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        if not isinstance(expert, Path):
            return expert
        with self.clock("load"):
            tensors = load_file(expert / "model.safetensors", device=str(self.clock.device))
            prefix = self.task.prefixes(self.base)[0]
            return {n.removeprefix(prefix): t for n, t in tensors.items() if not n.endswith("position_ids")}

    @torch.no_grad()
    def make_experts(self, expert: Tuned, names: Iterable[str]) -> Experts:
        """The new task's for the layers `names`."""
        tuned, found, r = self._load(expert), {}, self.options.rank
        for name in names:
            layer = self.layers[name]
            with self.clock("load"):
                delta = tuned[f"{name}.weight"] - layer.weight
            if layer.experts:
                with self.clock("project"):
                    delta = without_leading(delta, torch.stack(layer.dense_experts()).sum(0))
            with self.clock("decompose"):
                U, S, Vh = torch.linalg.svd(delta, full_matrices=True)
                found[name] = LowRankExpert(S[:r, None] * Vh[:r], U[:, : min(r, len(S))])
        return found

    def _adapt(self, tuned: Mapping[str, Tensor], seeds: TaskData, batches: Iterable[Tensor]) -> list[float]:
        """Train the newest gates by distillation, asking the teacher at every step; when each step ended."""
        teacher = copy.deepcopy(self.base).eval()
        teacher.get_submodule(self.task.tower(teacher)).load_state_dict(dict(tuned))
        gates = [p for layer in self.layers.values() for p in layer.gates[-1].parameters()]
        optimizer, temperature = torch.optim.Adam(gates, float(self.options.lr)), self.options.temperature
        interference = {name: torch.zeros_like(layer.basis[0]) for name, layer in self.layers.items()}
        marks = []
        for index in batches:
            batch = seeds.select(index).to(self.clock.device)
            with torch.no_grad():
                target = torch.softmax(self.task.logits(teacher, batch) / temperature, -1)
            student = torch.log_softmax(self.task.logits(self.model, batch) / temperature, -1)
            optimizer.zero_grad()
            (-(target * student).sum(-1).mean()).backward()
            for name, layer in self.layers.items():
                self._project(layer, interference[name])
            optimizer.step()
            marks.append(self.clock.now())
        return marks

    @torch.no_grad()
    def _project(self, layer: MergedLinear, S: Tensor) -> None:
        """The relaxed projection of one layer's gate gradient, with the basis fetched from the CPU."""
        if not layer.basis.shape[1]:
            return
        gradient: Any = layer.gates[-1].weight.grad  # [1, d_in]
        U = layer.basis.to(gradient.device)
        along = gradient @ U  # [1, K]
        ratio = (along.abs() / (gradient.norm(dim=1, keepdim=True) + 1e-12)).mean(0)
        S.mul_(self.options.beta).add_((1 - self.options.beta) * ratio.to(S.device))
        gradient -= (along * torch.exp(-self.gamma * S).to(gradient.device)) @ U.T

    @torch.no_grad()
    def protect(self, seeds: TaskData, batch_size: int = 128) -> None:
        """Add the task's leading input directions of every layer to its basis."""
        for layer in self.layers.values():
            layer.covariance = layer.weight.new_zeros(*[layer.weight.shape[1]] * 2)
        for batch in seeds.batches(batch_size):
            self.task.logits(self.model, batch)
        for layer in self.layers.values():
            assert layer.covariance is not None
            leading = torch.linalg.eigh(layer.covariance)[1].flip(1)[:, : self.options.k].cpu()
            layer.basis, layer.covariance = torch.linalg.qr(torch.cat([layer.basis, leading], 1)).Q, None

    def gates(self) -> Gates:
        def of(gates: Iterable[Any]) -> Tensor:
            return torch.stack([torch.cat([gate.weight[0], gate.bias]).detach() for gate in gates])

        return {name: of(layer.gates) for name, layer in self.layers.items()}

    def bases(self) -> dict[str, Tensor]:
        return {name: layer.basis for name, layer in self.layers.items()}
