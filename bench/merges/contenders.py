"""The ways to a merged model: this library, its plain formulas with full SVDs, and the published way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mingle import linalg
from mingle.adaptation.trace import StepProgress
from mingle.bench.machine import Stopwatch
from mingle.bench.measure import OURS
from mingle.bench.merges.agreement import Experts, Gates
from mingle.bench.merges.cases import BF16, EAGER, PUBLISHED, MergeProblem, Tuned
from mingle.bench.merges.published import PublishedMerge
from mingle.merging.evaluate import accuracy
from mingle.merging.finetuned import FineTuned
from mingle.merging.merged_task import MergedTask
from mingle.merging.merger import Merger
from mingle.methods import experts, gated
from mingle.methods import mingle as method
from mingle.methods.mingle import Mingle
from mingle.tasks import TaskData

#: what earlier tasks left, one mapping per task, as `mingle.methods.mingle.Mingle.task_tensors` returns it
History = Sequence[Mapping[str, Tensor]]
#: owner, name and substitute of a function that is to run differently
Replaced = tuple[Any, str, Callable[..., Any]]
NOTES = {
    OURS: "this library, fp32",
    BF16: "this library, bf16 products during adaptation",
    EAGER: 'this library with backend="eager" and LAPACK\'s full decompositions in float64',
    PUBLISHED: """the published procedure: dense experts merged in every forward, a teacher pass at every \
step, two full SVDs per layer""",
}
#: whose gates must be ours within rounding
EXACT = (OURS, EAGER, PUBLISHED)


class OurMerge:
    """`mingle.Merger`, its clock told which stage runs; eager with LAPACK's decompositions in float64."""

    def __init__(self, problem: MergeProblem, clock: Stopwatch, options: Mapping[str, Any]) -> None:
        self.clock, self.full = clock, options.get("backend") == "eager"
        with clock("load"):
            self.merger = Merger(problem.base, "mingle", problem.task.name, device=clock.device, **options)
        self.task, self.model = self.merger.task, self.merger.model
        assert isinstance(self.merger.method, Mingle)
        self.method = self.merger.method
        self.layers: Mapping[str, Any] = self.method.layers

    def restore(self, history: History) -> None:
        """Take on the experts, gates and bases of earlier tasks."""
        device = self.clock.device
        self.method.restore([{k: tensor.to(device) for k, tensor in one.items()} for one in history], {})
        for i in range(len(history)):  # the next task's number decides its random gates and batches
            self.merger.merged.append(MergedTask(f"earlier {i}"))
            self.merger.matrix.append([None] * (i + 1))

    def add(
        self, expert: Tuned, seeds: TaskData, given: Experts | None = None, *, protect: bool = True
    ) -> list[float]:
        """Merge one more task, its experts `given` or made, with or without the last stage, its directions.
        Returns the seconds of every adaptation step but the first.
        """
        marks: list[tuple[float, int]] = []

        def mark(progress: StepProgress) -> None:
            marks.append((time.perf_counter(), progress.step))

        replaced: list[Replaced] = [] if protect else [(Mingle, "_protect", lambda method, *_: method.bases)]
        replaced += [] if given is None else [(method, "shared_experts", lambda *_, **__: given)]
        with self._watched(replaced):
            self.merger.add(f"task {len(self.merger.merged)}", expert, seeds, on_step=mark)
        return [(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairwise(marks)]

    def make_experts(self, expert: Tuned, names: Sequence[str]) -> Experts:
        """The experts of the task that would come next, for some layers only; changes nothing."""
        tuned = FineTuned(expert, self.merger.base, self.merger.task).tensors()
        deltas = {name: tuned[f"{name}.weight"] - self.method.base[f"{name}.weight"] for name in names}
        earlier = {name: self.method.layers[name].experts() for name in names}
        with self._watched([]), self.clock("decompose"):
            return experts.make_experts(deltas, earlier, self.method.options.rank)

    def gates(self) -> Gates:
        every = {name: layer.all_gates() for name, layer in self.layers.items()}
        return {name: torch.cat([w, b[:, None]], 1).detach() for name, (w, b) in every.items()}

    def bases(self) -> Mapping[str, Tensor]:
        """By layer the protected directions [d_in, K]."""
        return self.method.bases

    @contextmanager
    def _watched(self, replaced: Sequence[Replaced]) -> Iterator[None]:
        """While the block runs, the clock is told of every stage, and what is `replaced` runs differently."""

        def svd(B: Tensor, A: Tensor) -> Any:
            return torch.linalg.svd((B @ A).double(), full_matrices=False)

        lapack = partial(linalg.svd_lowrank, backend="lapack")
        full: list[Replaced] = [(linalg, "factored_svd", svd), (linalg, "svd_lowrank", lapack)]
        stages = [(FineTuned, "tensors", "load"), (gated, "task_vector", "load")]
        stages += [(method, "shared_experts", "decompose"), (experts, "project_out_experts", "project")]
        stages += [(Mingle, "_adapt", "adapt"), (Mingle, "_protect", "subspace")]
        with ExitStack() as stack:
            for owner, name, by in (*(full if self.full else ()), *replaced):
                stack.enter_context(mock.patch.object(owner, name, by))
            for owner, name, stage in stages:
                timed = self.clock(stage)(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield


Contender = OurMerge | PublishedMerge


def start(
    name: str, problem: MergeProblem, clock: Stopwatch, past: History = (), **overrides: Any
) -> Contender:
    """A contender by name, behind the tasks of `past`; `overrides` of the problem's options."""
    own = {EAGER: {"backend": "eager"}, BF16: {"precision": "bf16"}}.get(name, {})
    make = PublishedMerge if name == PUBLISHED else OurMerge
    contender: Contender = make(problem, clock, {**problem.options, **overrides, **own})
    if past:
        contender.restore(past)
    return contender


def mean_accuracy(contender: Contender, tests: Sequence[TaskData]) -> float:
    """Per cent, the mean over tasks."""
    with contender.clock("evaluate"):
        return sum(accuracy(contender.task, contender.model, test) for test in tests) / len(tests)
