"""Three ways to a merged model: this library, its plain formulas with full decompositions, and the published
procedure.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from mingle import linalg
from mingle.adaptation.batches import shuffled_batches
from mingle.bench.endtoend.cases import Problem, Tuned
from mingle.bench.endtoend.clock import Stopwatch
from mingle.bench.peers.published import Published
from mingle.io.state_dicts import task_vector
from mingle.merging.evaluate import accuracy
from mingle.merging.merger import MergedTask, Merger
from mingle.methods import experts, gated
from mingle.methods import mingle as mingle_method
from mingle.methods.mingle import Mingle, MingleOptions
from mingle.nn.linear import GATE_INIT_STD, LowRankExpert
from mingle.tasks import TaskData

Experts = dict[str, LowRankExpert]
Gates = dict[str, tuple[Tensor, Tensor]]
#: what earlier tasks left, one mapping per task, as `mingle.methods.mingle.Mingle.task_tensors` returns it
History = Sequence[Mapping[str, Tensor]]


class Contender(Protocol):
    """A merge in progress; its clock is told which stage is running."""

    def restore(self, history: History) -> None:
        """Take on the experts, gates and bases of earlier tasks."""

    def add(
        self, expert: Tuned, seeds: TaskData, given: Experts | None = None, *, protect: bool = True
    ) -> list[float]:
        """Merge one more task, with its experts `given` or made.  Returns the seconds of every adaptation
        step but the first.

        Without `protect` the last stage, its directions, is left out.
        """

    def make_experts(self, expert: Tuned, names: Sequence[str]) -> Experts:
        """The experts of the task that would come next, for some layers only; changes nothing."""

    def accuracy(self, tests: Sequence[TaskData]) -> float:
        """Per cent, the mean over tasks."""

    def gates(self) -> Gates:
        """By layer the weights [T, d_in] and biases [T] of all gates."""

    def bases(self) -> dict[str, Tensor]:
        """By layer the protected directions [d_in, K]."""

    def shapes(self) -> dict[str, list[str]]:
        """The layers by the shape of their weight."""


class Ours:
    """`mingle.Merger`; with `full`, every decomposition is LAPACK's of the dense matrix in float64."""

    def __init__(
        self, problem: Problem, clock: Stopwatch, options: Mapping[str, Any], full: bool = False
    ) -> None:
        self.clock, self.full, self._tasks = clock, full, problem.tasks
        with clock("load"):
            self.merger = Merger(problem.base, "mingle", problem.task.name, device=clock.device, **options)

    @property
    def method(self) -> Mingle:
        method = self.merger.method
        assert isinstance(method, Mingle)
        return method

    def restore(self, history: History) -> None:
        device = self.clock.device
        self.method.restore(
            [{name: tensor.to(device) for name, tensor in tensors.items()} for tensors in history], {}
        )
        for i in range(len(history)):  # the next task's number decides its random gates and batches
            self.merger.merged.append(MergedTask(f"earlier {i}"))
            self.merger.matrix.append([None] * (i + 1))

    def add(
        self, expert: Tuned, seeds: TaskData, given: Experts | None = None, *, protect: bool = True
    ) -> list[float]:
        marks: list[float] = []
        steps: list[int] = []

        def mark(progress: Any) -> None:
            marks.append(time.perf_counter())
            steps.append(progress.step)

        with self._watched(given, protect):
            self.merger.add(f"task {len(self.merger.merged)}", expert, seeds, on_step=mark)
        return [(marks[i] - marks[i - 1]) / (steps[i] - steps[i - 1]) for i in range(1, len(marks))]

    def make_experts(self, expert: Tuned, names: Sequence[str]) -> Experts:
        tuned = self.merger._tower_tensors("next", expert)
        weights = [f"{name}.weight" for name in names]
        deltas = dict(zip(names, task_vector(self.method.base, tuned, weights).values(), strict=True))
        earlier = {name: self.method.layers[name].experts() for name in names}
        with self._watched():
            return mingle_method.make_experts(deltas, earlier, self.method.options.rank)

    def accuracy(self, tests: Sequence[TaskData]) -> float:
        return _accuracy(self.clock, self.merger.task, self.merger.model, tests)

    def gates(self) -> Gates:
        every = {name: layer.all_gates() for name, layer in self.method.layers.items()}
        return {name: (weight.detach(), bias.detach()) for name, (weight, bias) in every.items()}

    def bases(self) -> dict[str, Tensor]:
        return self.method.bases

    def shapes(self) -> dict[str, list[str]]:
        return _by_shape(self.method.layers)

    def last_experts(self) -> Experts:
        return {name: layer.experts()[-1] for name, layer in self.method.layers.items()}

    @contextmanager
    def _watched(self, given: Experts | None = None, protect: bool = True) -> Iterator[None]:
        """While the block runs, the clock is told of every stage, and decompositions are replaced where that
        is asked for.
        """
        with ExitStack() as stack:

            def replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
                stack.enter_context(mock.patch.object(owner, name, by))

            if self.full:
                replace(
                    linalg,
                    "factored_svd",
                    lambda B, A: torch.linalg.svd((B @ A).double(), full_matrices=False),
                )
                replace(linalg, "svd_lowrank", partial(linalg.svd_lowrank, backend="lapack"))
            if not protect:
                replace(Mingle, "_protect", lambda method, *_: method.bases)
            if given is not None:
                replace(mingle_method, "make_experts", lambda *_, **__: given)
            for owner, name, stage in (
                (Merger, "_tower_tensors", "load"),
                (gated, "task_vector", "load"),
                (mingle_method, "make_experts", "decompose"),
                (experts, "project_out_experts", "project"),
                (Mingle, "_adapt", "adapt"),
                (Mingle, "_protect", "subspace"),
            ):
                replace(owner, name, _timed(self.clock, stage, getattr(owner, name)))
            yield


def _timed(clock: Stopwatch, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock(stage):
            return function(*args, **kwargs)

    return timed


class PublishedMerge:
    """`mingle.bench.peers.published.Published`, given the gates and batches that our seeds make."""

    def __init__(self, problem: Problem, clock: Stopwatch, options: Mapping[str, Any]) -> None:
        self.clock, self.task, self.count = clock, problem.task, 0
        self.options = MingleOptions(**{name: value for name, value in options.items() if name != "backend"})
        with clock("load"):
            base = problem.module().to(clock.device)
            suffixes = self.options.layers or problem.task.layer_sets["full"]
            self.peer = Published(base, problem.task, self.options, suffixes, clock)

    def restore(self, history: History) -> None:
        for tensors in history:
            for name, layer in self.peer.layers.items():
                A, B, weight, bias, basis = (
                    tensors[f"{name}.{key}"].clone()
                    for key in ("A", "B", "gate_weight", "gate_bias", "basis")
                )
                layer.add_expert(A, B, weight, bias)
                layer.basis = torch.cat([layer.basis, basis], 1)
        self.count += len(history)

    def add(
        self, expert: Tuned, seeds: TaskData, given: Experts | None = None, *, protect: bool = True
    ) -> list[float]:
        tuned = self._load(expert)
        generator = torch.Generator().manual_seed(zlib.crc32(f"0/{self.count}".encode()))
        new_gates = {name: torch.zeros(layer.weight.shape[1]) for name, layer in self.peer.layers.items()}
        if self.options.gate_init == "normal":
            for gate in new_gates.values():
                gate.normal_(std=GATE_INIT_STD, generator=generator)
        marks: list[float] = []
        batches = shuffled_batches(len(seeds), self.options.batch_size, generator)
        timed = _marked(islice(batches, self.options.steps), marks, self.clock)
        self.peer.add(tuned, seeds, new_gates, timed, given, protect=protect)
        self.count += 1
        return [end - start for start, end in pairwise(marks[1:])]

    def make_experts(self, expert: Tuned, names: Sequence[str]) -> Experts:
        return {
            name: LowRankExpert(A, B) for name, (A, B) in self.peer.experts(self._load(expert), names).items()
        }

    def _load(self, expert: Tuned) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        if not isinstance(expert, Path):
            return expert
        with self.clock("load"):
            tensors = load_file(expert / "model.safetensors", device=str(self.clock.device))
            return {
                name.removeprefix(self.task.prefixes[0]): t
                for name, t in tensors.items()
                if not name.endswith("position_ids")
            }

    def accuracy(self, tests: Sequence[TaskData]) -> float:
        return _accuracy(self.clock, self.task, self.peer.model, tests)

    def gates(self) -> Gates:
        return self.peer.gates()

    def bases(self) -> dict[str, Tensor]:
        return {name: layer.basis for name, layer in self.peer.layers.items()}

    def shapes(self) -> dict[str, list[str]]:
        return _by_shape(self.peer.layers)


def _by_shape(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault("×".join(map(str, layer.weight.shape)), []).append(name)
    return found


def _marked(batches: Iterator[Tensor], marks: list[float], clock: Stopwatch) -> Iterator[Tensor]:
    """The same batches, with the time noted when each is asked for, and at the end."""
    for index in batches:
        marks.append(_now(clock))
        yield index
    marks.append(_now(clock))


def _now(clock: Stopwatch) -> float:
    if clock.device.type == "cuda":
        torch.cuda.synchronize(clock.device)
    return time.perf_counter()


def _accuracy(clock: Stopwatch, task: Any, model: Any, tests: Sequence[TaskData]) -> float:
    with clock("evaluate"):
        return sum(accuracy(task, model, test) for test in tests) / len(tests)


OURS, BF16, EAGER, PUBLISHED = "mingle", "mingle bf16", "eager, full SVDs", "published"
NOTES = {
    OURS: "this library, fp32",
    BF16: "this library, bf16 products during adaptation",
    EAGER: 'this library with backend="eager" and LAPACK\'s full decompositions in float64',
    PUBLISHED: "the published procedure: dense experts merged in every forward, a teacher pass at every step, two full SVDs per layer",
}
#: the status of a contender that the machine is too small for
LEFT_OUT = "left out"
#: whose gates must be ours within rounding
EXACT = (OURS, EAGER, PUBLISHED)


def start(name: str, problem: Problem, clock: Stopwatch, **overrides: Any) -> Contender:
    """A contender by name, before its first task; `overrides` of the problem's options."""
    options = problem.options | overrides
    if name == PUBLISHED:
        return PublishedMerge(problem, clock, options)
    if name == EAGER:
        return Ours(problem, clock, options | {"backend": "eager"}, full=True)
    return Ours(problem, clock, options | ({"precision": "bf16"} if name == BF16 else {}))
