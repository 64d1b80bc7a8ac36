"""The common part of all merging methods: an arrival, what is kept after it, and plain merged weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from mingle.adaptation.trace import AdaptTrace, StepProgress
from mingle.io.state_dicts import first_names, task_vector
from mingle.kernels.dtypes import wide
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.tasks import TaskData, TaskType

Tensors = dict[str, torch.Tensor]
#: what is saved of each task, where a tensor may be read when it is asked for
SavedTasks = Sequence[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class NoOptions:
    """The options of a method without any."""


@dataclass(frozen=True)
class Arrival:
    """One fine-tuned model and what comes with it.

    Attributes:
        index: how many models arrived before.
        name: the task's name.
        tuned: the fine-tuned tower, under the base tower's parameter names.
        seeds: unlabelled samples, or None for methods that need no data.
        teacher: makes the fine-tuned model; called only by methods that adapt.
        seed: of everything random in this step.
        on_step: told of an adaptation's progress.
    """

    index: int
    name: str
    tuned: Mapping[str, torch.Tensor]
    seeds: TaskData | None
    teacher: Callable[[], nn.Module]
    seed: int
    on_step: Callable[[StepProgress], None] | None = None

    def samples(self) -> TaskData:
        """The seed samples.

        Raises:
            ValueError: there are none.
        """
        if not self.seeds:
            raise ValueError(f"task {self.name!r}: this method adapts on seed samples, and none were given")
        return self.seeds


@dataclass
class StepReport:
    """The outcome of merging one model.

    Attributes:
        skipped: why nothing was merged, or None.
        trace: the adaptation's course, where there was one.
        notes: things worth telling, such as a saturated basis.
        calibration: seconds that it took to measure, after the merge, what tells tasks apart.
    """

    skipped: str | None = None
    trace: AdaptTrace | None = None
    notes: list[str] = field(default_factory=list)
    calibration: float = 0.0


class Kept(NamedTuple):
    """How many bytes are kept, at most.

    Attributes:
        task: of each task alone.
        state: of all tasks together.
    """

    task: int
    state: int


class Left(NamedTuple):
    """What is kept of a merge once a task has left it.

    Attributes:
        tasks: the tensors of each other task, in order of arrival.
        state: those of all tasks together.
        stays: what the task leaves behind in them, in words; nothing where they are those of a merge that
            never had it.
        in_all: whether that is also in what earlier tasks have, and not only in what later ones have.
    """

    tasks: list[Tensors]
    state: Tensors
    stays: list[str]
    in_all: bool = False


class Folded(NamedTuple):
    """A gated tower for one task, its gates held constant.

    Attributes:
        tower: plain weights under the base's names.
        gates: layer → the constant gates [T] of all experts, oldest first.
        by_task: the gate of every task's expert in every layer, of those tasks that have any, [T, L].
    """

    tower: Tensors
    gates: Tensors
    by_task: torch.Tensor


class MergeMethod(ABC):
    """A method that merges models one after another into a tower.

    Args:
        model: the merged model, changed in place by `add`.
        task: its task type.
        base: the pre-trained tower's tensors; never changed.
        options: an instance of the method's `Options`.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    needs_seeds: ClassVar[bool] = False
    #: whether models may come without seed samples where the option ``steps`` is 0
    adapts_by_choice: ClassVar[bool] = False
    #: whether seed samples come with the fine-tuned model's answers, in task types that compare models along
    #: these
    needs_answers: ClassVar[bool] = True
    #: whether each model was fine-tuned from the one before, and the seed samples are all of a task's
    #: training data
    sequential: ClassVar[bool] = False
    #: whether every task is served by a model of its own (only the reference row `individual`)
    per_task: ClassVar[bool] = False
    #: whether a further task may change the answers to earlier ones, where it is known that they are of these
    interferes: ClassVar[bool] = True
    #: whether `folded` wants samples, for the means of gates over them
    folds_by_means: ClassVar[bool] = False
    #: whether it finds the task of every sample, see `route`
    routes: ClassVar[bool] = False

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        self.model = model
        self.task = task
        self.tower = model.get_submodule(task.tower(model))
        self.base = base
        self.options = options

    @abstractmethod
    def add(self, arrival: Arrival) -> StepReport:
        """Merge one more model.  If it raises, the method's state and the model are as before."""

    @abstractmethod
    def task_tensors(self, index: int) -> Tensors:
        """The tensors kept of one task alone; with `state_tensors` they suffice to go on merging."""

    @abstractmethod
    def state_tensors(self) -> Tensors:
        """The tensors kept of all tasks together."""

    @abstractmethod
    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        """Return, bit for bit, to the state that `task_tensors` and `state_tensors` gave."""

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        """What is kept once task `index` has left; nothing is changed.

        Args:
            index: of the task, which is not the only one.
            tasks: the `task_tensors` of all tasks; not to be changed.

        Raises:
            ValueError: what is kept does not tell the task's part from that of others.
        """
        raise ValueError(
            f"method {self.name!r} keeps all that it merged as one, from which no single task can be taken "
            "out again"
        )

    def requires_seeds(self) -> bool:
        """Whether no model can arrive without seed samples, with these options."""
        return self.needs_seeds and not (self.adapts_by_choice and self.options.steps == 0)

    def rewrites_tasks(self) -> bool:
        """Whether an arrival changes what is kept of earlier tasks alone, or what is kept grows with them."""
        return False

    def kept_bytes(self) -> Kept:
        """How large `task_tensors` and `state_tensors` will be, from shapes alone; rather too much."""
        return Kept(0, 0)

    def merges(self) -> Collection[str]:
        """The names of the tower's tensors that merging changes; all others stay those of the base."""
        return self.base.keys()

    def select(self, index: int) -> None:  # noqa: B027 – most methods have nothing to do
        """Make the model the one that serves task `index`; a merged model serves all tasks as it is."""

    def route(self, data: TaskData) -> torch.Tensor | None:
        """The numbers of the tasks that a router gives samples to, int64 [n]; None without a router."""
        return None

    def plain_tower(self) -> Tensors:
        """The tower as plain weights that answer as the model does now, under the base's names.

        Of tied tensors only the first name is there.

        Raises:
            ValueError: the method leaves no such tower.
        """
        raise ValueError(
            f"method {self.name!r}: how much of each expert is at work depends on the input, so no plain "
            "model gives the same answers; keep the merged folder and load it with "
            "mingle.Merger.from_pretrained, name a task to fold the experts into a model for it alone, "
            "export adapters in the format 'peft', or merge with a method that leaves plain weights "
            "(average, task-arithmetic, opcm, …; mingle with gates='static')"
        )

    def folded(self, index: int, samples: TaskData | None) -> Folded:
        """A plain tower for task `index`, its experts folded into the weights with constant gates.

        Args:
            index: of the task.
            samples: of the task, for methods that `folds_by_means`; without any, its own expert's gate is 1
                and all others are 0.

        Raises:
            ValueError: the method has no gates.
        """
        raise ValueError(f"with method {self.name!r} one model serves all tasks; leave the task out")

    def adapter(self, index: int) -> dict[str, LowRankExpert]:
        """What task `index` adds to the base where its gates are 1, by layer; empty if it was skipped.

        Raises:
            ValueError: the method keeps no low-rank experts of the untouched base.
        """
        raise ValueError(
            f"method {self.name!r} keeps no low-rank expert per task, so there are no adapters to export; "
            "take the format 'transformers'"
        )

    def chooses(self) -> bool:
        """Whether a single expert, or none, answers an input, with a gate of 1."""
        return False


class PlainMethod(MergeMethod):
    """A method whose merged model is one plain tower.

    Attributes:
        base: as given, but with only one entry for tensors that the model ties together, so that none counts
            twice.
        merged: the merged tower, under the names of `base`, in float32 or float64: a base of half precision
            gets it rounded, but the next step starts from what was not.
        state: the other tensors that the next step needs.
    """

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        #: every name of a tensor of the tower → the one under which it is kept
        self.kept_as = first_names(model.get_submodule(task.tower(model)))
        super().__init__(
            model, task, {name: base[name] for name, kept in self.kept_as.items() if name == kept}, options
        )
        self.merged: Tensors = widened(self.base)
        self.state: Tensors = {}

    def take(self, merged: Tensors, state: Tensors) -> None:
        """Make `merged` the merged tower and put it into the model."""
        self.tower.load_state_dict({name: merged[kept] for name, kept in self.kept_as.items()})
        self.merged, self.state = merged, state

    def plain_tower(self) -> Tensors:
        return {name: tensor.to(self.base[name].dtype) for name, tensor in self.merged.items()}

    def kept_bytes(self) -> Kept:
        whole = kept_size(self.tower.state_dict().values())
        return Kept(0, whole + whole // 2)  # in some methods a count for every entry

    def task_tensors(self, index: int) -> Tensors:
        return {}

    def state_tensors(self) -> Tensors:
        return {f"merged/{name}": t for name, t in self.merged.items()} | {
            f"state/{name}": t for name, t in self.state.items()
        }

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        self.take(widened(_under("merged/", state)), _under("state/", state))


class WeightMethod(PlainMethod):
    """A method that is a pure function of weights.

    Subclasses give `update`.
    """

    @abstractmethod
    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        """The new merged tower and running state, from `base`, `merged`, `state` and the arrival.

        None of these is changed.
        """

    def add(self, arrival: Arrival) -> StepReport:
        self.take(*self.update(arrival))
        return StepReport()

    def vectors(self, tuned: Mapping[str, torch.Tensor]) -> tuple[Tensors, Tensors]:
        """M = merged − θ₀ and Δ_t = θ_t − θ₀, in float32 or wider."""
        return task_vector(self.base, self.merged, self.base), task_vector(self.base, tuned, self.base)


def widened(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies in float32, or float64 where a tensor is."""
    return {name: tensor.to(wide(tensor), copy=True) for name, tensor in tensors.items()}


def kept_size(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors as they are kept, in float32 at least."""
    return sum(tensor.numel() * max(tensor.dtype.itemsize, 4) for tensor in tensors)


def others(index: int, tasks: list[Tensors]) -> list[Tensors]:
    """All tasks but `index`."""
    return [*tasks[:index], *tasks[index + 1 :]]


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
