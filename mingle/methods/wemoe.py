"""Continual LoRA-WEMoE: weight-ensembling mixtures of low-rank experts in the MLPs.

After Tang et al., arXiv 2402.00433, made continual.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from mingle.adaptation.losses import entropy
from mingle.adaptation.train import AdaptConfig, adapt_gates
from mingle.kernels.gated_experts import reference
from mingle.methods.base import Arrival, Kept, Left, SavedTasks, StepReport, Tensors, kept_size, widened
from mingle.methods.experts import shared_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.task_arithmetic import add_task_vector
from mingle.nn.linear import GATE_INIT_STD, MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.options import require_not_negative, require_positive
from mingle.tasks import TaskType


@dataclass(frozen=True)
class WemoeOptions:
    """Settings of continual LoRA-WEMoE; the defaults are those of the published comparison for vision.

    Attributes:
        rank, later_rank: of the first expert, and of those after it.
        layers: target layers as exact suffixes; None takes the MLP layers of the task type.
        reduce: what a router sees: each token, the mean of a sample, or the mean of the batch.
        init: a new gate's bias, and λ of the task arithmetic in the attention layers.
        steps, lr, batch_size, micro_batch_size: of the entropy minimisation, see
            `mingle.adaptation.train.AdaptConfig`.
        backend: see `mingle.functional.gated_experts`.
        precision: of the products during adaptation, see `mingle.adaptation.train.AdaptConfig`.
    """

    rank: int = 64
    later_rank: int = 16
    layers: tuple[str, ...] | None = None
    reduce: Literal["token", "sample", "batch"] = "sample"
    init: float = 0.3
    steps: int = 50
    lr: float = 1e-4
    batch_size: int = 16
    micro_batch_size: int | None = None
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        require_positive(self, "rank", "later_rank", "batch_size", "micro_batch_size")
        require_not_negative(self, "steps", "lr")


class Wemoe(GatedMethod):
    """W₀ + Σ_i g_i(x̄) B_i A_i in the MLPs, with B_i A_i ≈ Δ_i and one linear router per MLP.

    x̄ is the mean token of the MLP's input.  All gates of all tasks train at every step, towards answers of
    low entropy.  Attention layers are merged by task arithmetic, θ ← θ + λ Δ, biases included; the MLPs'
    biases, norms and embeddings stay those of the base.
    """

    name = "wemoe"
    Options = WemoeOptions
    layer_set = "mlp"

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        super().__init__(model, task, base, options)
        attention = [name for name in self.structure.layers["attention"] if name not in self.layers]
        #: the tensors that task arithmetic merges, not rounded to the base's dtype
        self.attention: Tensors = widened(
            {key: base[key] for name in attention for key in base if key.rpartition(".")[0] == name}
        )
        #: the layers whose gates serve all target layers of their module
        self.routers = route_by_module(self.layers)

    def add(self, arrival: Arrival) -> StepReport:
        before = self.attention
        init = self.options.init
        self._load(
            {
                name: add_task_vector(tensor, self.base[name], arrival.tuned[name], init)
                for name, tensor in before.items()
            }
        )
        try:
            return super().add(arrival)
        except BaseException:
            self._load(before)
            raise

    def _merge(self, arrival: Arrival, deltas: Mapping[str, torch.Tensor]) -> StepReport:
        options = self.options
        generator = torch.Generator().manual_seed(arrival.seed)
        first = all(place is None for place in self.places)
        experts = shared_experts(
            deltas, dict.fromkeys(deltas, ()), options.rank if first else options.later_rank
        )
        for name, layer in self.layers.items():
            gate = torch.zeros(layer.in_features)
            if name in self.routers:
                gate.normal_(std=GATE_INIT_STD, generator=generator)
            self._append(
                name, experts[name].A.to(layer.weight), experts[name].B.to(layer.weight), gate, options.init
            )
        config = AdaptConfig(
            options.steps, options.lr, options.batch_size, options.micro_batch_size, options.precision
        )
        trace = adapt_gates(
            self.task,
            self.model,
            self.routers,
            arrival.samples(),
            entropy,
            config,
            generator,
            on_step=arrival.on_step,
        )
        return StepReport(trace=trace)

    def _append(
        self, name: str, A: torch.Tensor, B: torch.Tensor, gate: torch.Tensor, bias: float | torch.Tensor
    ) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates(layer.num_experts if name in self.routers else 0)

    def kept_bytes(self) -> Kept:
        return super().kept_bytes()._replace(state=kept_size(self.attention.values()))

    def merges(self) -> Collection[str]:
        return [*super().merges(), *self.attention]

    def adapter(self, index: int) -> dict[str, LowRankExpert]:
        raise ValueError(
            f"method {self.name!r} merges the attention layers by task arithmetic, which is not of low rank, "
            "so no adapter of the untouched base holds what a task has; name a task to fold the experts into "
            "a model for it, in the format 'transformers'"
        )

    def fold(self, gates: Mapping[str, torch.Tensor]) -> Tensors:
        merged = {name: tensor.to(self.base[name].dtype) for name, tensor in self.attention.items()}
        return super().fold(gates) | merged

    def _load(self, tensors: Tensors) -> None:
        self.tower.load_state_dict(tensors, strict=False)
        self.attention = tensors

    def state_tensors(self) -> Tensors:
        return self.attention

    def rewrites_tasks(self) -> bool:
        return True  # all gates train

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        raise ValueError(
            f"method {self.name!r} trains all gates together, and keeps the merged attention layers as one "
            "sum, from which no single task can be taken out again"
        )

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        super().restore(tasks, state)
        self._load(widened(state))


def route_by_module(layers: Mapping[str, MingleLinear]) -> dict[str, MingleLinear]:
    """Let the gates of the first layer in every module also serve the others there; returns those first ones.

    The hooks that pass the gates on are copied and pickled with the model.
    """
    modules: dict[str, list[str]] = {}
    for name in layers:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for names in modules.values():
        router, *others = (layers[name] for name in names)
        if others:
            router.register_forward_pre_hook(partial(_pass_on, others))
        for other in others:
            other.register_forward_hook(_forget)
    return {names[0]: layers[names[0]] for names in modules.values()}


def _pass_on(others: list[MingleLinear], router: MingleLinear, args: tuple[torch.Tensor, ...]) -> None:
    with torch.autocast(args[0].device.type, enabled=False):  # gates stay in fp32
        gates = reference.gate_values(args[0], *router.all_gates(), router.reduce, router.counted(args[0]))
    for other in others:
        other.given_gates = gates


def _forget(layer: MingleLinear, *_: Any) -> None:
    layer.given_gates = None
