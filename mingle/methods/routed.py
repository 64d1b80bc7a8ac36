"""Routed experts: one per task, chosen per sample by Gaussians over features of the base.

Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.methods.base import Arrival, Kept, StepReport, Tensors
from mingle.methods.experts import make_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.layer_router import LayerRouter, joined
from mingle.methods.router_choice import TEMPERATURES, ExpertRouter, TaskFeatures, choose, measured, settings
from mingle.nn.early_stop import run_until
from mingle.options import require_positive
from mingle.tasks import TaskData, TaskType

#: the most depths that are tried where none are asked for
MOST_DEPTHS = 8
#: how many seed samples room is reckoned for
USUAL_SEEDS = 100


@dataclass(frozen=True)
class RoutedOptions:
    """Settings of the routed experts.

    Attributes:
        rank: r of every expert, the truncated SVD of its task vector.
        layers: target layers as exact suffixes; None takes all linear layers of the task type's tower.
        depths: after how many transformer blocks of the base hidden states are read, together; 0 means the
            embeddings.  None tries up to eight depths one by one, and takes the first of those that tell the
            tasks' seed samples apart best.
        spread: whether the tokens' standard deviations count beside their means.
        own_covariance, shrinkage: see `mingle.methods.router.GaussianRouter`.
        temperature: what log-likelihoods are divided by.
            Of these four, what is None is chosen by the seed samples too; see
            `mingle.methods.router_choice`.
        gates: ``soft``, all experts by their posterior probability, or ``hard``, the likeliest task's expert
            alone.
        seniority: by how many nats a task is preferred to the one that arrived after it.  Where two tasks
            claim a sample, the older one already has users: this keeps their accuracy, at the newcomer's
            expense.
        abstain: samples that are stranger to the likeliest task than its seed samples are, by that many
            standard deviations on a logarithmic scale, go to the base model, which keeps what it can do
            without any task; None sends none there.  See `mingle.methods.router.strangeness`.
        backend: see `mingle.functional.gated_experts`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    depths: tuple[int, ...] | None = None
    spread: bool | None = None
    own_covariance: float | None = None
    shrinkage: float | None = None
    temperature: float | None = None
    gates: Literal["hard", "soft"] = "soft"
    seniority: float = 0.0
    abstain: float | None = 3.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        depths = self.depths
        if depths is not None and (not depths or min(depths) < 0 or len(set(depths)) < len(depths)):
            raise ValueError(
                f"depths={list(depths)}: expected one or more distinct numbers of blocks, from 0 on"
            )
        if self.own_covariance is not None and not 0 <= self.own_covariance < 1:
            raise ValueError(f"own_covariance={self.own_covariance}: expected a value in [0, 1)")
        if self.shrinkage is not None and not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage={self.shrinkage}: expected a value in (0, 1]")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected a positive, finite value")
        if not 0 <= self.seniority < math.inf:
            raise ValueError(f"seniority={self.seniority}: expected a finite value >= 0")
        if self.abstain is not None and self.abstain <= 0:
            raise ValueError(f"abstain={self.abstain}: expected a positive value")


class Routed(GatedMethod):
    """W₀ + Σ_i g_i(x) B_i A_i, with the same gates g(x) [T] in all layers, given by a router.

    The router sees a sample's features: mean and standard deviation of its tokens' hidden states, as the base
    model computes them, at some depth.  A decoder's sample is its prompt, and what was decided on it holds
    for the whole sequence; see `mingle.methods.layer_router.LayerRouter`.  Adding a task leaves the
    statistics of earlier ones as they are, but may move the depth and the sureness of all decisions; see
    `mingle.methods.router_choice`.  Biases, norms and embeddings stay those of the base.
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
        self.candidates = candidates(options.depths, len(blocks))
        self.grid = settings(
            True if options.depths and len(options.depths) > 1 else options.spread,
            options.own_covariance,
            options.shrinkage,
        )
        self.encoder = self.tower.get_submodule(first.parent)
        decoders = {
            self.tower.get_submodule(stack.parent): [
                layer for name, layer in self.layers.items() if self.structure.block_of(name) in stack.blocks
            ]
            for stack in later
        }
        self.router = LayerRouter(list(self.layers.values()), blocks)
        self.router.register(model, self.encoder, decoders)
        #: for each task that has an expert, what is kept of its features at every candidate
        self.features: list[list[TaskFeatures]] = []

    def _merge(self, arrival: Arrival, deltas: Tensors) -> StepReport:
        seen = self._features(arrival.samples(), self.candidates)
        earlier = [[task[c] for task in self.features] for c in range(len(self.candidates))]
        kept = [measured(x, before, self.grid) for x, before in zip(seen, earlier, strict=True)]
        experts = make_experts(deltas, dict.fromkeys(deltas, ()), self.options.rank)
        for name, layer in self.layers.items():
            self._append(
                name,
                experts[name].A.to(layer.weight),
                experts[name].B.to(layer.weight),
                torch.zeros(layer.in_features),
                0.0,
            )
        return StepReport(notes=self._route([*self.features, kept]))

    def route(self, data: TaskData) -> Tensor | None:
        """The likeliest tasks, also of samples so strange that the base model answers them by itself."""
        router = self.router.router
        if router is None:
            return None
        owners = [task for task, place in enumerate(self.places) if place is not None]
        [features] = self._features(data, [self.router.read])
        likeliest = router.likeliest(features)
        return torch.tensor(owners, device=likeliest.device)[likeliest]

    def _features(self, data: TaskData, candidates: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """The features of samples at every candidate, [n, F]."""
        read = sorted({depth for depths in candidates for depth in depths})
        seen: list[list[Tensor]] = []

        def record(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moments = dict(zip(read, self.router.features(encoder, args, kwargs, read), strict=True))
            seen.append([joined([moments[depth] for depth in depths]) for depths in candidates])

        with torch.no_grad():
            for batch in data.batches(TEACHER_BATCH):
                run_until([self.encoder], partial(self.task.logits, self.model, batch), record)
        return [torch.cat(batches) for batches in zip(*seen, strict=True)]

    def kept_bytes(self) -> Kept:
        widths: dict[str | None, int] = {}
        for name, layer in self.layers.items():
            widths.setdefault(self.structure.block_of(name), layer.in_features)
        blocks = self.structure.stacks[0].blocks
        numbers = 0
        for depths in self.candidates:
            features = 2 * sum(widths.get(blocks[depth], max(widths.values())) for depth in depths)
            numbers += features * (1 + min(features, USUAL_SEEDS)) + len(self.grid) * len(TEMPERATURES)
        experts = super().kept_bytes()
        return experts._replace(task=experts.task + numbers * torch.float64.itemsize)

    def _append(self, name: str, A: Tensor, B: Tensor, gate: Tensor, bias: float | Tensor) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates(0)

    def _route(self, tasks: list[list[TaskFeatures]]) -> list[str]:
        """Set the router by what is kept of all tasks; returns what it chose and why."""
        options = self.options
        choice = choose(tasks, self.grid, options.temperature)
        depths = self.candidates[choice.candidate]
        self.router.router = ExpertRouter(
            [task[choice.candidate] for task in tasks],
            choice.setting,
            choice.temperature,
            hard=options.gates == "hard",
            seniority=options.seniority,
            abstain=options.abstain,
        )
        self.router.read, self.features = depths, tasks
        return [choice.told(depths)] if len(tasks) > 1 else []

    def chooses(self) -> bool:
        return bool(self.options.gates == "hard")

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        if place is None:
            return {}
        return super().task_tensors(index) | {
            f"router.{_name(depths)}.{key}": value
            for depths, kept in zip(self.candidates, self.features[place], strict=True)
            for key, value in kept._asdict().items()
        }

    def restore(self, tasks: list[Tensors], state: Tensors) -> None:
        super().restore(tasks, state)
        kept = [
            [
                TaskFeatures(*(tensors[f"router.{_name(depths)}.{key}"] for key in TaskFeatures._fields))
                for depths in self.candidates
            ]
            for tensors in tasks
            if tensors
        ]
        if kept:
            self._route(kept)


def candidates(depths: tuple[int, ...] | None, blocks: int) -> list[tuple[int, ...]]:
    """The depths that can be read, each alone, or those that were asked for together.

    Args:
        depths: as in `RoutedOptions`.
        blocks: how many the model has.

    Raises:
        ValueError: a depth that it does not have.
    """
    if depths is None:
        count = min(MOST_DEPTHS, blocks)
        return [(round(k * (blocks - 1) / max(count - 1, 1)),) for k in range(count)]
    if max(depths) >= blocks:
        deepest = f"the model has {blocks} blocks, so {blocks - 1} is the deepest"
        raise ValueError(f"depths={list(depths)}: {deepest}")
    return [tuple(sorted(depths))]


def _name(depths: tuple[int, ...]) -> str:
    return "-".join(map(str, depths))
