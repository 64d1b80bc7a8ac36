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
from torch import Tensor, nn

from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.methods.base import Arrival, StepReport, Tensors
from mingle.methods.experts import make_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.layer_router import LayerRouter
from mingle.methods.router import FeatureStatistics, GaussianRouter
from mingle.nn.early_stop import run_until
from mingle.options import require_positive
from mingle.tasks import TaskData, TaskType

#: after how many blocks hidden states are read, where nothing is asked for and the model has that many
DEPTHS = (0, 1, 2)


@dataclass(frozen=True)
class RoutedOptions:
    """Settings of the routed experts.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        depths: after how many transformer blocks of the base hidden states are read; 0 means the embeddings.
            None takes those of 0, 1 and 2 that the model has.
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
    depths: tuple[int, ...] | None = None
    gates: Literal["hard", "soft"] = "hard"
    own_covariance: float = 0.1
    shrinkage: float = 0.03
    seniority: float = 1.0
    abstain: float | None = 4.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        depths = self.depths
        if depths is not None and (not depths or min(depths) < 0 or len(set(depths)) < len(depths)):
            raise ValueError(
                f"depths={list(depths)}: expected one or more distinct numbers of blocks, from 0 on"
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
    model computes them, at a few shallow depths.  A decoder's sample is its prompt, and what was decided on
    it holds for the whole sequence; see `mingle.methods.layer_router.LayerRouter`.  Adding a task leaves the
    statistics of earlier ones as they are: they lose only the samples that the new one claims.  Biases, norms
    and embeddings stay those of the base.
    """

    name = "routed"
    Options = RoutedOptions
    layer_set = "full"
    needs_answers = False
    folds_by_means = False  # the task's expert works alone
    routes = True

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        first, *later = self.structure.stacks
        blocks = [self.tower.get_submodule(block) for block in first.blocks]
        depths = options.depths or tuple(depth for depth in DEPTHS if depth < len(blocks))
        if max(depths) >= len(blocks):
            deepest = f"the model has {len(blocks)} blocks, so {len(blocks) - 1} is the deepest"
            raise ValueError(f"depths={list(depths)}: {deepest}")
        self.encoder = self.tower.get_submodule(first.parent)
        decoders = {
            self.tower.get_submodule(stack.parent): [
                layer for name, layer in self.layers.items() if self.structure.block_of(name) in stack.blocks
            ]
            for stack in later
        }
        self.router = LayerRouter(
            list(self.layers.values()), [blocks[depth] for depth in sorted(depths)], options
        )
        self.router.register(model, self.encoder, decoders)
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
