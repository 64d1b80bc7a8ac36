"""Routed experts: one per task, chosen per sample by Gaussians over the base's shallow features.

Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.methods.base import Arrival, StepReport, Tensors
from mingle.methods.experts import make_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.router import FeatureStatistics, GaussianRouter
from mingle.nn.early_stop import run_until
from mingle.nn.linear import MingleLinear
from mingle.options import require_positive
from mingle.tasks import TaskData, TaskType


@dataclass(frozen=True)
class RoutedOptions:
    """Settings of the routed experts.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        depths: after how many transformer blocks of the base hidden states are read; 0 means the embeddings.
        gates: ``hard``, the likeliest task's expert alone, or ``soft``, all experts by their posterior
            probability.
        own_covariance, shrinkage: see `mingle.methods.router.GaussianRouter`.
        seniority: by how many nats a task is preferred to the one that arrived after it.  Where two tasks
            claim a sample, the older one already has users: this keeps their accuracy, at the newcomer's
            expense.
        abstain: samples whose features are stranger than this to the likeliest task go to the base model,
            which keeps what it can do without any task; None sends none there.  See
            `mingle.methods.router.GaussianRouter.strangeness`.
        backend: see `mingle.functional.gated_experts`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    depths: tuple[int, ...] = (0, 1, 2)
    gates: Literal["hard", "soft"] = "hard"
    own_covariance: float = 0.1
    shrinkage: float = 0.03
    seniority: float = 1.0
    abstain: float | None = 4.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        if not self.depths or min(self.depths) < 0 or len(set(self.depths)) < len(self.depths):
            raise ValueError(
                f"depths={list(self.depths)}: expected one or more distinct numbers of blocks, from 0 on"
            )
        if not 0 <= self.own_covariance < 1:
            raise ValueError(f"own_covariance={self.own_covariance}: expected a value in [0, 1)")
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage}: expected a value in (0, 1]")
        if not 0 <= self.seniority < math.inf:
            raise ValueError(f"seniority={self.seniority}: expected a finite value >= 0")
        if self.abstain is not None and self.abstain <= 0:
            raise ValueError(f"abstain={self.abstain}: expected a positive value")


class Routed(GatedMethod):
    """W₀ + Σ_i g_i(x) B_i A_i, with the same gates g(x) [T] in all layers, given by a router.

    The router sees a sample's features: mean and standard deviation of its tokens' hidden states, as the base
    model computes them, at a few shallow depths.  Adding a task leaves the statistics of earlier ones as they
    are: they lose only the samples that the new one claims.  Biases, norms and embeddings stay those of the
    base.
    """

    name = "routed"
    Options = RoutedOptions
    layer_set = "full"
    needs_answers = False
    folds_by_means = False  # the task's expert works alone
    routes = True

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        stack = self.structure.stacks[0]
        self.encoder = self.tower.get_submodule(stack.parent)
        sequence = [self.tower.get_submodule(block) for block in stack.blocks]
        if max(options.depths) >= len(sequence):
            deepest = f"the model has {len(sequence)} blocks, so {len(sequence) - 1} is the deepest"
            raise ValueError(f"depths={list(options.depths)}: {deepest}")
        self.router = LayerRouter(
            list(self.layers.values()), [sequence[depth] for depth in sorted(options.depths)], options
        )
        self.encoder.register_forward_pre_hook(self.router, with_kwargs=True)
        #: one for each task that has an expert
        self.statistics: list[FeatureStatistics] = []

    def _merge(self, arrival: Arrival, deltas: Tensors) -> StepReport:
        statistics = [*self.statistics, FeatureStatistics.of(self._features(arrival.samples()))]
        experts = make_experts(deltas, dict.fromkeys(deltas, ()), self.options.rank)
        for name, layer in self.layers.items():
            self._append(
                name,
                experts[name].A.to(layer.weight),
                experts[name].B.to(layer.weight),
                torch.zeros(layer.in_features),
                0.0,
            )
        self._route(statistics)
        return StepReport()

    def route(self, data: TaskData) -> Tensor | None:
        """The likeliest tasks, also of samples so strange that the base model answers them by itself."""
        if not self.statistics:
            return None
        owners = [task for task, place in enumerate(self.places) if place is not None]
        likeliest = self.router.likeliest(self._features(data))
        return torch.tensor(owners, device=likeliest.device)[likeliest]

    def _features(self, data: TaskData) -> Tensor:
        """The features of samples, [n, F]."""
        seen: list[Tensor] = []

        def record(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(self.router.features(encoder, args, kwargs))

        with torch.no_grad():
            for batch in data.batches(TEACHER_BATCH):
                run_until([self.encoder], partial(self.task.logits, self.model, batch), record)
        return torch.cat(seen)

    def _append(self, name: str, A: Tensor, B: Tensor, gate: Tensor, bias: float | Tensor) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates(0)

    def _route(self, statistics: list[FeatureStatistics]) -> None:
        options = self.options
        self.router.router = GaussianRouter(
            statistics, own=options.own_covariance, shrinkage=options.shrinkage
        )
        self.statistics = statistics

    def chooses(self) -> bool:
        return bool(self.options.gates == "hard")

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        if place is None:
            return {}
        return super().task_tensors(index) | {
            f"router.{key}": value for key, value in self.statistics[place]._asdict().items()
        }

    def restore(self, tasks: list[Tensors], state: Tensors) -> None:
        super().restore(tasks, state)
        kept = [
            FeatureStatistics(*(tensors[f"router.{key}"] for key in FeatureStatistics._fields))
            for tensors in tasks
            if tensors
        ]
        if kept:
            self._route(kept)


class LayerRouter:
    """A forward pre-hook of an encoder that sets all gates by what the base model makes of the same input.

    It is copied and pickled with the model.

    Args:
        layers: the layers that it gives gates to, the first of them inside the encoder.
        blocks: those blocks of the encoder whose inputs are read, in order.
        options: see `RoutedOptions`.
    """

    def __init__(self, layers: list[MingleLinear], blocks: list[nn.Module], options: RoutedOptions) -> None:
        self.layers, self.blocks, self.options = layers, blocks, options
        self.router: GaussianRouter | None = None

    def __call__(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.router is not None:
            self._give(self.gates(self.features(encoder, args, kwargs)))

    def likeliest(self, features: Tensor) -> Tensor:
        """The places [n] of the likeliest tasks among those with an expert, for features [n, F]."""
        return self._scores(features).argmax(1)

    def _scores(self, features: Tensor) -> Tensor:
        """Log-likelihoods [n, T], older tasks preferred."""
        assert self.router is not None
        scores = self.router.scores(features)
        older = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
        return scores + self.options.seniority * older

    def gates(self, features: Tensor) -> Tensor:
        """The gates [n, T] for features [n, F]."""
        assert self.router is not None
        options, scores = self.options, self._scores(features)
        likeliest = scores.argmax(1)
        gates = scores.softmax(1) if options.gates == "soft" else F.one_hot(likeliest, scores.shape[1])
        if options.abstain is not None:
            gates = gates * (self.router.strangeness(features, likeliest) <= options.abstain).unsqueeze(1)
        return gates.float()

    @torch.no_grad()
    def features(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Mean and standard deviation over tokens of the base model's hidden states, [n, 2 · depths · d]."""
        seen: list[Tensor] = []

        def read(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.extend(_moments(hidden, self.layers[0].token_mask))

        *earlier, last = self.blocks
        handles = [block.register_forward_pre_hook(read, with_kwargs=True) for block in earlier]
        first = self.layers[0]
        self._give(first.weight.new_zeros(first.num_experts) if first.num_experts else None)
        try:
            with torch.autocast(first.weight.device.type, enabled=False):
                run_until([last], partial(encoder.forward, *args, **kwargs), read)
        finally:
            self._give(None)
            for handle in handles:
                handle.remove()
        return torch.cat(seen, 1)

    def _give(self, gates: Tensor | None) -> None:
        for layer in self.layers:
            layer.given_gates = gates


def _moments(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [n, d] of hidden states [n, N, d] over the tokens in `mask` [n, N]."""
    weight = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    weight = (weight / weight.sum(1, keepdim=True)).unsqueeze(2)
    mean = (weight * hidden).sum(1)
    return mean, (weight * (hidden - mean.unsqueeze(1)).square()).sum(1).sqrt()
