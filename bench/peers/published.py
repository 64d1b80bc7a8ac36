"""The published procedure, written a second time from the paper: every forward pass adds dense experts to the
weight.

What it shares with this library is how a batch becomes logits and the names of the options; no kernel, no
layer, no decomposition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.methods.mingle import MingleOptions
from mingle.tasks import TaskData, TaskType

#: stage → a block in which that stage's time is taken
Clock = Callable[[str], AbstractContextManager[object]]


def _no_clock(_: str) -> AbstractContextManager[object]:
    return nullcontext()


class MergedLinear(nn.Module):
    """y = x (W₀ + Σ_i g_i B_i A_i)ᵀ + b: one merged weight for the whole batch, or one for every sample."""

    def __init__(self, linear: nn.Linear, per_batch: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.per_batch = linear.weight, linear.bias, per_batch
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.gates = nn.ModuleList()
        self.basis = torch.empty(linear.in_features, 0, dtype=linear.weight.dtype)  # stays on the CPU

    def add_expert(self, A: Tensor, B: Tensor, gate_weight: Tensor, gate_bias: float | Tensor = 0.0) -> None:
        """A [r, d_in], B [d_out, r]; all older gates freeze."""
        self.gates.requires_grad_(False)
        gate = nn.Linear(A.shape[1], 1).to(self.weight)
        with torch.no_grad():
            gate.weight.copy_(gate_weight)
            gate.bias.fill_(gate_bias)
        self.A.append(nn.Parameter(A.to(self.weight), requires_grad=False))
        self.B.append(nn.Parameter(B.to(self.weight), requires_grad=False))
        self.gates.append(gate)

    def dense_experts(self) -> list[Tensor]:
        """B_i A_i [d_out, d_in]."""
        return [B @ A for A, B in zip(self.A, self.B, strict=True)]

    def merged(self, gates: Tensor) -> Tensor:
        """W₀ + Σ_i g_i B_i A_i for gates [T]."""
        weight = self.weight
        for gate, expert in zip(gates, self.dense_experts(), strict=True):
            weight = weight + gate * expert
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.gates:
            return F.linear(x, self.weight, self.bias)
        gates = torch.cat([gate(x) for gate in self.gates], -1).mean(
            1
        )  # [n, T], means over each sample's tokens
        if self.per_batch:
            return F.linear(x, self.merged(gates.mean(0)), self.bias)
        return torch.stack(
            [F.linear(tokens, self.merged(row), self.bias) for tokens, row in zip(x, gates, strict=True)]
        )


class Published:
    """A continual merge as published, task after task.

    Args:
        base: the pre-trained model; copied.
        task: how its batches become logits.
        options: of `mingle.methods.mingle.Mingle`; only what was published is known.
        suffixes: of the target layers.
        clock: told which stage is running.

    Raises:
        ValueError: an option that the published procedure does not have.
    """

    def __init__(
        self,
        base: nn.Module,
        task: TaskType,
        options: MingleOptions,
        suffixes: Iterable[str],
        clock: Clock = _no_clock,
    ) -> None:
        if (
            options.gates != "newest"
            or options.constraint == "none"
            or options.reduce == "token"
            or options.precision != "fp32"
        ):
            raise ValueError(
                "the published procedure trains the newest gate in fp32, constrained, with gates of a batch or a sample"
            )
        self.base, self.task, self.options, self.clock = base, task, options, clock
        self.gamma = options.gamma if options.constraint == "relaxed" else 0.0
        self.model = copy.deepcopy(base).eval().requires_grad_(False)
        tower = self.model.get_submodule(task.tower)
        self.layers: dict[str, MergedLinear] = {}
        for name, module in list(tower.named_modules()):
            if name.endswith(tuple(f".{suffix}" for suffix in suffixes)):
                assert isinstance(module, nn.Linear)
                self.layers[name] = MergedLinear(module, options.reduce == "batch")
                tower.set_submodule(name, self.layers[name])

    def add(
        self,
        tuned: Mapping[str, Tensor],
        seeds: TaskData,
        new_gates: Mapping[str, Tensor],
        batches: Iterable[Tensor],
        given: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        *,
        protect: bool = True,
    ) -> None:
        """Merge one more model.

        Args:
            tuned: its tower, under the base tower's names.
            seeds: samples of its task.
            new_gates: the initial weight [d_in] of the new gate by layer.
            batches: the seeds' indices, one tensor for every step.
            given: A and B of the new experts by layer, instead of decomposing.
            protect: whether to end with `protect`.
        """
        for name, (A, B) in (given or self.experts(tuned, self.layers)).items():
            self.layers[name].add_expert(A, B, new_gates[name])
        with self.clock("adapt"):
            self.adapt(tuned, seeds, batches)
        if protect:
            with self.clock("subspace"):
                self.protect(seeds)

    @torch.no_grad()
    def experts(self, tuned: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, d_in] and B [d_out, r] of the new task for the layers `names`."""
        found = {}
        for name in names:
            layer = self.layers[name]
            with self.clock("load"):
                delta = tuned[f"{name}.weight"] - layer.weight
            if layer.gates:
                with self.clock("project"):
                    delta = _without_earlier(delta, torch.stack(layer.dense_experts()).sum(0))
            with self.clock("decompose"):
                U, S, Vh = torch.linalg.svd(delta, full_matrices=True)
                r = self.options.rank
                found[name] = S[:r, None] * Vh[:r], U[:, : min(r, len(S))]
        return found

    def adapt(self, tuned: Mapping[str, Tensor], seeds: TaskData, batches: Iterable[Tensor]) -> None:
        """Train the newest gates by distillation; the teacher answers at every step."""
        teacher = copy.deepcopy(self.base).eval()
        teacher.get_submodule(self.task.tower).load_state_dict(dict(tuned))
        device = next(teacher.parameters()).device
        optimizer = torch.optim.Adam(
            [p for layer in self.layers.values() for p in layer.gates[-1].parameters()], lr=self.options.lr
        )
        interference = {name: torch.zeros_like(layer.basis[0]) for name, layer in self.layers.items()}
        temperature = self.options.temperature
        for index in batches:
            batch = seeds.select(index).to(device)
            with torch.no_grad():
                target = torch.softmax(self.task.logits(teacher, batch) / temperature, -1)
            student = torch.log_softmax(self.task.logits(self.model, batch) / temperature, -1)
            loss = -(target * student).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            for name, layer in self.layers.items():
                self._project(layer, interference[name])
            optimizer.step()

    @torch.no_grad()
    def _project(self, layer: MergedLinear, S: Tensor) -> None:
        """The relaxed projection of one layer's gate gradient, with the basis fetched from the CPU."""
        if not layer.basis.shape[1]:
            return
        gradient = layer.gates[-1].weight.grad  # [1, d_in]
        assert gradient is not None
        U = layer.basis.to(gradient.device)
        along = gradient @ U  # [1, K]
        ratio = (along.abs() / (gradient.norm(dim=1, keepdim=True) + 1e-12)).mean(0)
        S.mul_(self.options.beta).add_((1 - self.options.beta) * ratio.to(S.device))
        strength = torch.exp(-self.gamma * S).to(gradient.device)
        gradient -= (along * strength) @ U.T

    @torch.no_grad()
    def protect(self, seeds: TaskData, batch_size: int = 128) -> None:
        """Add the task's leading input directions of every layer to its basis."""
        with _covariances(self.layers) as seen:
            for batch in seeds.batches(batch_size):
                self.task.logits(self.model, batch)
        for name, layer in self.layers.items():
            _, vectors = torch.linalg.eigh(seen[name])
            leading = vectors.flip(1)[:, : self.options.k].cpu()
            layer.basis = torch.linalg.qr(torch.cat([layer.basis, leading], 1)).Q

    def gates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the weights [T, d_in] and biases [T] of all gates."""
        return {
            name: (
                torch.cat([gate.weight.detach() for gate in layer.gates]),
                torch.cat([gate.bias.detach() for gate in layer.gates]),
            )
            for name, layer in self.layers.items()
        }


def _without_earlier(delta: Tensor, earlier: Tensor) -> Tensor:
    """Δ without the block that the leading directions of the earlier update span, as many as its effective
    rank.
    """
    U, S, Vh = torch.linalg.svd(earlier, full_matrices=True)
    share = S / S.sum()
    rank = int(math.exp(-torch.xlogy(share, share).sum().item()))
    core = U.T @ delta @ Vh.T
    core[:rank, :rank] = 0
    return U @ core @ Vh


@contextmanager
def _covariances(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, Σ xᵀx [d_in, d_in] of what every layer is given, each by itself."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def collect(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            seen[name] = seen.get(name, 0) + x.T @ x

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
