"""The common part of methods in which a router, the same for all layers, decides about gates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mingle.adaptation.teacher import TEACHER_BATCH
from mingle.methods.experts import make_experts, shared_experts
from mingle.methods.gated import GatedMethod
from mingle.methods.layer_router import LayerRouter, Moments
from mingle.nn.early_stop import run_until
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.tasks import TaskData, TaskType
from mingle.tasks.shares import of_all, own_batches


class Decision(NamedTuple):
    """What a router makes of samples.

    Attributes:
        shares: how much speaks for every task, [n, T], each row a sum of 1; 0 for a task without an expert.
        strange: which samples are so strange that it opens no gate, bool [n].
    """

    shares: Tensor
    strange: Tensor


class RouterMethod(GatedMethod):
    """A router sees what the base makes of a sample somewhere in its first stack of blocks.

    A decoder's sample is its prompt, and what was decided on it holds for the whole sequence; see
    `mingle.methods.layer_router.LayerRouter`.

    Subclasses may say where it looks, and set `router.router` and `router.read` when a task was merged.
    """

    layer_set = "full"
    routes = True

    def __init__(self, model: nn.Module, task: TaskType, base: Mapping[str, Tensor], options: Any) -> None:
        super().__init__(model, task, base, options)
        first, *later = self.structure.stacks
        self.encoder = self.tower.get_submodule(first.parent)
        decoders = {
            self.tower.get_submodule(stack.parent): [
                layer for name, layer in self.layers.items() if self.structure.block_of(name) in stack.blocks
            ]
            for stack in later
        }
        self.router = self.made_router()
        self.router.register(model, self.encoder, decoders)

    def made_router(self) -> LayerRouter:
        """The router of all layers, not set."""
        return LayerRouter(list(self.layers.values()), self.sites())

    def sites(self) -> list[nn.Module]:
        """The modules whose inputs can be read, in the order in which the first stack calls them."""
        return [self.tower.get_submodule(block) for block in self.structure.stacks[0].blocks]

    def route(self, data: TaskData) -> Tensor | None:
        """The likeliest tasks, also of samples so strange that the base model answers them by itself."""
        router = self.router.router
        if router is None:
            return None
        owners = [task for task, place in enumerate(self.places) if place is not None]
        likeliest = torch.cat([router.likeliest(moments) for moments in self.moments(data, self.router.read)])
        return torch.tensor(owners, device=likeliest.device)[likeliest]

    def decision(self, data: TaskData) -> Decision | None:
        """What the router makes of samples; None before it knows any task."""
        router = self.router.router
        if router is None:
            return None
        seen = self.moments(data, self.router.read)
        found = torch.cat([router.shares(moments) for moments in seen])
        shares = found.new_zeros(len(found), len(self.places))
        shares[:, [place is not None for place in self.places]] = found
        return Decision(shares, torch.cat([router.gates(moments).sum(1) == 0 for moments in seen]))

    @contextmanager
    def only(self, tasks: Collection[int]) -> Iterator[None]:
        """Inside the block the router chooses among these tasks; without any the base model answers."""
        router = self.router.router
        among = torch.tensor([i in tasks for i, place in enumerate(self.places) if place is not None])
        if router is None or not among.any():
            with super().only(tasks):
                yield
            return
        before, router.among = router.among, among.to(next(self.tower.parameters()).device)
        try:
            with super().only(tasks):
                yield
        finally:
            router.among = before

    def moments_of_all(self, data: TaskData, read: Sequence[int]) -> list[list[Moments]]:
        """The same as `moments`, and in every process; each looks at its share of the samples."""
        device = next(self.tower.parameters()).device
        own = [
            [[part.cpu() for part in moments] for moments in batch]
            for batch in self._moments(own_batches(self.model, data, TEACHER_BATCH), read)
        ]
        return [
            [Moments(*(part.to(device) for part in moments)) for moments in batch] for batch in of_all(own)
        ]

    def moments(self, data: TaskData, read: Sequence[int]) -> list[list[Moments]]:
        """What the router reads at these sites, batch by batch."""
        return self._moments(data.batches(TEACHER_BATCH), read)

    def _moments(self, batches: Iterable[TaskData], read: Sequence[int]) -> list[list[Moments]]:
        seen: list[list[Moments]] = []

        def record(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(self.router.moments(encoder, args, kwargs, read))

        with torch.no_grad():
            for batch in batches:
                run_until([self.encoder], partial(self.task.logits, self.model, batch), record)
                if (rows := len(seen[-1][0].mean)) != len(batch):
                    raise ValueError(
                        f"{type(self.tower).__name__} passes {rows} rows through its blocks for {len(batch)} "
                        f"samples, and the router of {self.name!r} decides on whole samples; take a method "
                        "without a router"
                    )
        return seen

    def block_widths(self) -> list[int]:
        """The widths of what each site reads, as far as the layers tell."""
        widths: dict[str | None, int] = {}
        for name, layer in self.layers.items():
            widths.setdefault(self.structure.block_of(name), layer.in_features)
        return [widths.get(block, max(widths.values())) for block in self.structure.stacks[0].blocks]


class RoutedMethod(RouterMethod):
    """W₀ + Σ_i g_i(x) B_i A_i, with B_i A_i the truncated task vectors and the same gates g(x) in all layers.

    Nothing is trained.  Biases, norms and embeddings stay those of the base.  Subclasses' `Options` have
    ``rank``.
    """

    needs_answers = False
    folds_by_means = False  # the task's expert works alone

    def add_experts(self, deltas: Mapping[str, Tensor]) -> None:
        """Give every layer the truncated Δ as an expert."""
        experts = shared_experts(deltas, dict.fromkeys(deltas, ()), self.options.rank)
        for name, layer in self.layers.items():
            A, B = (part.to(layer.weight) for part in experts[name])
            self._append(name, A, B, torch.zeros(layer.in_features), 0.0)

    def expert(self, name: str, delta: Tensor, earlier: Sequence[LowRankExpert]) -> LowRankExpert:
        return make_experts({name: delta}, {name: ()}, self.options.rank)[name]

    def _append(self, name: str, A: Tensor, B: Tensor, gate: Tensor, bias: float | Tensor) -> None:
        layer = self.layers[name]
        layer.add_expert(A, B, gate_weight=gate, gate_bias=bias)
        layer.set_trainable_gates(0)
