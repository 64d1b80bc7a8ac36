"""MINGLE: null-space gated low-rank experts, merged at test time (Qiu et al., arXiv 2505.11883)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from mingle import heap, ranks
from mingle.adaptation import input_directions
from mingle.adaptation.answers import Compact, States
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.adaptation.fast_forward import fast_linears
from mingle.adaptation.losses import distillation
from mingle.adaptation.projector import RelaxedProjector
from mingle.adaptation.teacher import TEACHER_BATCH, teacher_answers
from mingle.adaptation.trace import AdaptTrace
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.methods.base import Arrival, Left, SavedTasks, StepReport, Tensors
from mingle.methods.experts import make_experts, own_layers, shared_experts
from mingle.methods.gated import FirstGates, GatedMethod
from mingle.nn.linear import GATE_INIT_STD
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.sharded import ShardedBlocks
from mingle.options import require_not_negative, require_positive
from mingle.tasks import TaskData, TaskType
from mingle.tasks.shares import own_batches

logger = logging.getLogger(__name__)

#: what is noted of a task that comes without samples where there is no adaptation
UNADAPTED = (
    "merged without samples: its gates stay as they start, and none of its input directions is protected"
)


@dataclass(frozen=True)
class MingleOptions:
    """Settings of MINGLE; the defaults are the paper's for vision.

    Attributes:
        rank: r of every expert.
        energy: an expert has fewer directions where these hold that share of ‖Δ‖², of what projection leaves
            of the task vector.
        layers: target layers as exact suffixes; None takes the method's own set for the task type.
        reduce: what the gates see: each token, the mean of a sample, or the mean of the batch.
        k: how many input directions of every task are protected per layer.
        gamma, beta: γ, the strength of relaxation, and β, the memory of S.
        steps, lr, batch_size, micro_batch_size: of the adaptation, see `mingle.adaptation.train.AdaptConfig`;
            with ``auto`` the learning rate goes by what the gates see.  With 0 steps there is none, and
            models may come without samples: their gates then stay as they start.
        temperature: of both soft-maxes in its loss.
        gates: which gates train: the newest one, all, or none at all (``static``, all gates constant).
        constraint: ``relaxed``, ``hard`` (λ = 1) or ``none``.
        static_coefficient: the constant gate of ``gates="static"``.
        gate_init: new gate weights: ``normal``, from N(0, 0.01²) as in the reference code, or ``zeros`` as in
            the paper's Algorithm 1.
        drop_diagonal: see `mingle.linalg.project_out`.
        backend: see `mingle.functional.gated_experts`.
        precision: of the products during adaptation, see `mingle.adaptation.train.AdaptConfig`.
    """

    rank: int = 64
    energy: float = 1.0
    layers: tuple[str, ...] | None = None
    reduce: Literal["token", "sample", "batch"] = "sample"
    k: int = 3
    gamma: float = 1.0
    beta: float = 0.99
    steps: int = 50
    lr: float | Literal["auto"] = 1e-4
    batch_size: int = 16
    micro_batch_size: int | None = None
    temperature: float = 2.0
    gates: Literal["newest", "all", "static"] = "newest"
    constraint: Literal["relaxed", "hard", "none"] = "relaxed"
    static_coefficient: float = 0.3
    gate_init: Literal["normal", "zeros"] = "normal"
    drop_diagonal: bool = False
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "rank", "batch_size", "micro_batch_size")
        require_not_negative(self, "k", "steps", "gamma", *(["lr"] if self.lr != "auto" else []))
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a positive value")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy}: expected a value in (0, 1]")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: expected a value in [0, 1)")


class Mingle(GatedMethod):
    """One gated expert per task and target layer; biases, norms and embeddings stay those of the base."""

    name = "mingle"
    Options = MingleOptions
    adapts_by_choice = True
    projects = True
    shares_blocks = True
    layer_set: ClassVar[str] = "full"

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        super().__init__(model, task, base, options)
        self.bases: Tensors = {
            name: layer.gate_weight.new_empty(layer.in_features, 0) for name, layer in self.layers.items()
        }
        #: per task, how many basis columns each layer had before it
        self.offsets: list[dict[str, int]] = []

    def add(self, arrival: Arrival) -> StepReport:
        before = self._widths()
        report = super().add(arrival)
        self.offsets.append(before)
        return report

    def _widths(self) -> dict[str, int]:
        return {name: basis.shape[1] for name, basis in self.bases.items()}

    def requires_seeds(self) -> bool:
        return super().requires_seeds() and self.options.gates != "static"

    def share_out(self, blocks: ShardedBlocks, device: torch.device) -> None:
        super().share_out(blocks, device)
        self.bases = {name: torch.empty_like(basis, device=device) for name, basis in self.bases.items()}

    def _merge(self, arrival: Arrival, deltas: Mapping[str, torch.Tensor]) -> StepReport:
        options, report = self.options, StepReport()
        gates = self.first_gates(arrival.seed)
        experts = self._experts(deltas)
        for names in self.in_turn():
            for name in names:
                (A, B), weight = experts[name], self.layers[name].weight
                self._append(name, A.to(weight), B.to(weight), gates.weights[name], gates.bias)
            heap.trim()  # of the shorter stacks
        del experts
        if options.gates == "static":
            return report
        if arrival.seeds or self.requires_seeds():
            report.trace = self._adapt(arrival, gates.generator)
            heap.trim()  # of the teacher
            self.bases = self._protect(arrival, report)
        else:
            report.notes += self.notes_without_samples()
        return report

    def _experts(self, deltas: Mapping[str, torch.Tensor]) -> dict[str, LowRankExpert]:
        """Every layer's new expert; the older ones, of which it is made too, are let go of."""
        options, earlier = self.options, self.experts_of(own_layers(deltas))
        return shared_experts(
            deltas, earlier, options.rank, drop_diagonal=options.drop_diagonal, energy=options.energy
        )

    @classmethod
    def from_weights(cls, options: Any) -> bool:
        adapts = options.steps > 0 and options.gates != "static"
        # With `energy`, experts of earlier tasks may be padded to the rank of a new one.
        return cls.adapts_by_choice and not adapts and options.energy == 1

    def expert(self, name: str, delta: torch.Tensor, earlier: Sequence[LowRankExpert]) -> LowRankExpert:
        options = self.options
        made = make_experts(
            {name: delta},
            {name: earlier},
            options.rank,
            drop_diagonal=options.drop_diagonal,
            energy=options.energy,
        )
        return made[name]

    def first_gates(self, seed: int) -> FirstGates:
        gates = super().first_gates(seed)
        if self.options.gates == "static":
            return gates._replace(bias=self.options.static_coefficient)
        for weight in gates.weights.values() if self.options.gate_init == "normal" else ():
            weight.normal_(std=GATE_INIT_STD, generator=gates.generator)
        return gates

    def beside_expert(self, name: str) -> Tensors:
        layer = self.layers[name]
        return {"basis": torch.empty(layer.in_features, 0, dtype=layer.gate_weight.dtype)}

    def notes_without_samples(self) -> list[str]:
        return [] if self.options.gates == "static" else [UNADAPTED]

    def _append(
        self, name: str, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, bias: float | torch.Tensor
    ) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates({"newest": 1, "all": layer.num_experts, "static": 0}[self.options.gates])

    def _adapt(self, arrival: Arrival, generator: torch.Generator) -> AdaptTrace:
        options, seeds = self.options, arrival.samples()
        projector = None
        if options.constraint != "none":
            gamma = options.gamma if options.constraint == "relaxed" else 0.0
            projector = RelaxedProjector(self.bases, gamma=gamma, beta=options.beta, backend=options.backend)

        def answers(samples: TaskData) -> torch.Tensor | States:
            return teacher_answers(self.task, arrival.teacher(), samples, TEACHER_BATCH)

        loss = distillation(answers, options.temperature)
        config = AdaptConfig(
            options.steps, options.lr, options.batch_size, options.micro_batch_size, options.precision
        )
        return adapt_gates(
            self.task, self.model, self.layers, seeds, loss, config, generator, projector, arrival.on_step
        )

    def _protect(self, arrival: Arrival, report: StepReport) -> Tensors:
        """The bases extended by this task's leading input directions.

        They are those of its seed samples in the model as it is merged now.
        """
        options = self.options
        if options.constraint == "none" or options.k == 0:
            return self.bases
        seeds = arrival.samples()
        # Not inside: it passes a few tokens through the model, whose directions are none of the task's.
        compact = Compact.of(self.task, self.model, seeds)

        def run() -> None:
            finite = True
            for batch in own_batches(self.model, seeds, TEACHER_BATCH):
                answers = (
                    self.task.logits(self.model, batch) if compact is None else compact.states(batch).hidden
                )
                if not answers.isfinite().all():
                    finite = False
                    break
            if not all(ranks.gather(finite)):
                raise AdaptationDiverged("the adapted model's answers to the seed samples are not finite")

        with torch.no_grad(), fast_linears(self.model):
            bases = input_directions.extended(self.bases, self.layers, run, options.k)
        if crowded := input_directions.crowded(bases, options.k):
            report.notes.append(crowded)
            logger.warning("%s: %s", arrival.name, crowded)
        return bases

    def plain_tower(self) -> Tensors:
        if self.options.gates != "static":
            return super().plain_tower()
        return self.fold({name: layer.all_gates()[1] for name, layer in self.layers.items()})

    def task_tensors(self, index: int) -> Tensors:
        tensors = super().task_tensors(index)
        for name in self.layers if tensors else ():
            last = self.offsets[index + 1][name] if index + 1 < len(self.offsets) else None
            tensors[f"{name}.basis"] = self.bases[name][:, self.offsets[index][name] : last]
        return tensors

    def rewrites_tasks(self) -> bool:
        # with `energy`, experts of earlier tasks may be padded to the rank of a new one
        return bool(self.options.gates == "all" or self.options.energy != 1)

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        """The task's columns of the bases go to the next task that has an expert, or with the last one.

        Directions that two tasks share are noted as those of the first.  So if a task's columns left while
        later ones stay, new gates would no longer be kept from what these need.
        """
        kept, state, stays, _ = super().without(index, tasks)
        later = self.later(index)
        in_all = self.options.gates == "all" and self.places[index] is not None
        if in_all:
            stays = ["all gates learned beside it, and stay as they are"]
        elif later:
            made = "experts" if self.options.gates == "static" else "experts and gates"
            stays = [f"{made} of tasks that arrived later were made beside it, and stay as they are"]
        own = {key: tensor for key, tensor in tasks[index].items() if key.endswith(".basis")}
        if later and any(basis.shape[1] for basis in own.values()):
            heir = kept[later[0] - 1]
            kept[later[0] - 1] = heir | {key: torch.cat([basis, heir[key]], 1) for key, basis in own.items()}
            stays.append(
                "its input directions stay protected, as those of the task that arrived next: what both need "
                "was noted once"
            )
        return Left(kept, state, stays, in_all)

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        super().restore(tasks, state)
        for tensors in tasks:
            self.offsets.append(self._widths())
            for name in self.layers if tensors else ():
                self.bases[name] = torch.cat([self.bases[name], tensors[f"{name}.basis"]], 1)


class MingleLight(Mingle):
    """MINGLE*: experts on the attention inputs and the first MLP layer only."""

    name = "mingle-light"
    layer_set = "light"
