"""MINGLE: null-space gated low-rank experts, merged at test time (Qiu et al., arXiv 2505.11883)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mingle import subspace
from mingle.adapt import TEACHER_BATCH, AdaptConfig, AdaptTrace, adapt_gates, teacher_logits
from mingle.inject import inject
from mingle.layers import GATE_INIT_STD, MingleLinear
from mingle.methods.base import Arrival, MergeMethod, StepReport, Tensors
from mingle.projection import make_experts
from mingle.relaxation import RelaxedProjector
from mingle.task_vector import task_vector
from mingle.tasks import TaskType

logger = logging.getLogger(__name__)

#: what one task leaves in a layer
_LAYER_TENSORS = ("A", "B", "gate_weight", "gate_bias", "basis")


@dataclass(frozen=True)
class MingleOptions:
    """Settings of MINGLE; the defaults are the paper's for vision.

    Attributes:
        rank: r of every expert.
        layers: target layers as exact suffixes; None takes the method's own set of the task type.
        reduce: what the gates see: each token, the mean of a sample, or of the batch.
        k: how many input directions of every task are protected per layer.
        gamma, beta: relaxation strength and memory of S.
        steps, lr, batch_size, temperature: adaptation, see `mingle.adapt.AdaptConfig`.
        gates: which gates train: the newest one, all, or none at all (``static``, all gates constant).
        constraint: ``relaxed``, ``hard`` (λ = 1) or ``none``.
        static_coefficient: the constant gate of ``gates="static"``.
        gate_init: new gate weights from N(0, 0.01²) as in the reference code, or ``zeros`` as in the paper's Algorithm 1.
        drop_diagonal: see `mingle.linalg.project_out`.
        backend: see `mingle.functional.gated_experts`.
        precision: of the products during adaptation, see `mingle.adapt.AdaptConfig`.
    """

    rank: int = 64
    layers: tuple[str, ...] | None = None
    reduce: Literal["token", "sample", "batch"] = "sample"
    k: int = 3
    gamma: float = 1.0
    beta: float = 0.99
    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    temperature: float = 2.0
    gates: Literal["newest", "all", "static"] = "newest"
    constraint: Literal["relaxed", "hard", "none"] = "relaxed"
    static_coefficient: float = 0.3
    gate_init: Literal["normal", "zeros"] = "normal"
    drop_diagonal: bool = False
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive integer")
        for name in ("k", "steps", "gamma", "lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a value >= 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive value")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: expected a value in [0, 1)")


class Mingle(MergeMethod):
    """One gated expert per task and target layer; biases, norms and embeddings stay those of the base."""

    name = "mingle"
    Options = MingleOptions
    needs_seeds = True
    layer_set: ClassVar[str] = "full"

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        targets = options.layers or task.layer_sets[self.layer_set]
        model.requires_grad_(False)
        self.layers: dict[str, MingleLinear] = inject(self.tower, targets, options.reduce, backend=options.backend)
        self.bases: Tensors = {name: layer.gate_weight.new_empty(layer.in_features, 0) for name, layer in self.layers.items()}
        #: per task, how many basis columns each layer had before it
        self.offsets: list[dict[str, int]] = []
        #: per task, its place among the experts, or None where it was skipped
        self.places: list[int | None] = []

    def add(self, arrival: Arrival) -> StepReport:
        deltas = task_vector(self.start(), arrival.tuned, [f"{name}.weight" for name in self.layers])
        if not any(delta.any() for delta in deltas.values()):
            self._count(merged=False)
            return StepReport(skipped=f"{arrival.name}: no target layer differs from the model it started from, no expert was added")
        before = {name: dict(layer.named_parameters(recurse=False)) for name, layer in self.layers.items()}
        try:
            report, bases = self._merge(arrival, deltas)
        except BaseException:
            for name, parameters in before.items():
                for key, parameter in parameters.items():
                    setattr(self.layers[name], key, parameter)
            raise
        self._count(merged=True)
        self.bases = bases
        return report

    def start(self) -> Mapping[str, torch.Tensor]:
        """The tower that the next model is compared with: what fine-tuning changed in it becomes an expert."""
        return self.base

    def _count(self, *, merged: bool) -> None:
        """Note one more task, before its directions join the bases."""
        self.offsets.append({name: basis.shape[1] for name, basis in self.bases.items()})
        self.places.append(sum(place is not None for place in self.places) if merged else None)

    def _merge(self, arrival: Arrival, deltas: Tensors) -> tuple[StepReport, Tensors]:
        options, report = self.options, StepReport()
        generator = torch.Generator().manual_seed(arrival.seed)
        deltas = {name: deltas[f"{name}.weight"] for name in self.layers}
        earlier = {name: layer.experts() for name, layer in self.layers.items()}
        experts = make_experts(deltas, earlier, options.rank, drop_diagonal=options.drop_diagonal)
        for name, layer in self.layers.items():
            gate = torch.zeros(layer.in_features)
            if options.gates != "static" and options.gate_init == "normal":
                gate.normal_(std=GATE_INIT_STD, generator=generator)
            bias = options.static_coefficient if options.gates == "static" else 0.0
            self._append(layer, experts[name].A.to(layer.weight), experts[name].B.to(layer.weight), gate, bias)
        if options.gates != "static":
            report.trace = self._adapt(arrival, generator)
        return report, self._protect(arrival, report)

    def _append(self, layer: MingleLinear, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, bias: float | torch.Tensor) -> None:
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates({"newest": 1, "all": layer.num_experts, "static": 0}[self.options.gates])

    def _adapt(self, arrival: Arrival, generator: torch.Generator) -> AdaptTrace:
        options, seeds = self.options, arrival.samples()
        targets = teacher_logits(self.task, arrival.teacher(), seeds, TEACHER_BATCH)
        projector = None
        if options.constraint != "none":
            gamma = options.gamma if options.constraint == "relaxed" else 0.0
            projector = RelaxedProjector(self.bases, gamma=gamma, beta=options.beta, backend=options.backend)
        config = AdaptConfig(options.steps, options.lr, options.batch_size, options.temperature, options.precision)
        return adapt_gates(self.task, self.model, self.layers, seeds, targets, config, generator, projector, arrival.on_step)

    def _protect(self, arrival: Arrival, report: StepReport) -> Tensors:
        """The bases with this task's dominant input directions, as the merged model now sees its seed samples."""
        options = self.options
        if options.constraint == "none" or options.gates == "static" or options.k == 0:
            return self.bases
        seeds = arrival.samples()
        with torch.no_grad(), subspace.input_directions(self.layers) as seen:
            for batch in seeds.batches(TEACHER_BATCH):
                self.task.logits(self.model, batch)
        bases = subspace.extend(self.bases, seen, options.k)
        full = subspace.saturated(bases)
        if full:
            report.notes.append(f"the protected directions fill the whole input space of {', '.join(full)}")
            logger.warning("%s: %s", arrival.name, report.notes[-1])
        return bases

    def task_tensors(self, index: int) -> Tensors:
        place = self.places[index]
        if place is None:
            return {}
        tensors: Tensors = {}
        for name, layer in self.layers.items():
            first = self.offsets[index][name]
            last = self.offsets[index + 1][name] if index + 1 < len(self.offsets) else None
            weight, bias = layer.all_gates()
            values = (layer.A[place], layer.B[place], weight[place], bias[place], self.bases[name][:, first:last])
            tensors |= {f"{name}.{key}": value.detach() for key, value in zip(_LAYER_TENSORS, values, strict=True)}
        return tensors

    def state_tensors(self) -> Tensors:
        return {}

    def restore(self, tasks: list[Tensors], state: Tensors) -> None:
        for tensors in tasks:
            self._count(merged=bool(tensors))
            if not tensors:
                continue
            for name, layer in self.layers.items():
                A, B, weight, bias, basis = (tensors[f"{name}.{key}"] for key in _LAYER_TENSORS)
                self._append(layer, A, B, weight, bias)
                self.bases[name] = torch.cat([self.bases[name], basis], 1)


class MingleLight(Mingle):
    """MINGLE*: experts on the attention inputs and the first MLP layer only."""

    name = "mingle-light"
    layer_set = "light"
