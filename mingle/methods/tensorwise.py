"""Methods that merge tensor by tensor, so that no more than one of them need be in memory.

A method says what happens to one tensor when a model arrives.  Where that depends on all of them, as a norm
of the whole model does, surveys come first: passes over all tensors that merge nothing.  The methods say it
once: `TensorMethod.update` applies it to a model in memory, `mingle.merging.streamed` to files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mingle.kernels.dtypes import wide
from mingle.methods.base import Arrival, Tensors, WeightMethod, kept_size

#: of all tensors together: what is kept of them, and what surveys found, by name
Numbers = dict[str, float]


@dataclass(frozen=True)
class TensorStep:
    """One tensor when a model arrives, or rows of it where a method is `TensorMethod.elementwise`.

    Attributes:
        name: the tensor's, in the tower.
        base: θ₀.
        merged: θ of the step before, in float32, or float64 where the base is.
        tuned: θ_t.
        kept: what was kept of it, see `TensorMethod.kept_of`; empty before the first step.
        seen: how many models arrived before.
        seed: of everything random.
    """

    name: str
    base: Tensor
    merged: Tensor
    tuned: Tensor
    kept: Mapping[str, Tensor]
    seen: int
    seed: int

    def at(self, rows: Any) -> TensorStep:
        """The same of a part of the tensor, as an index takes it: views."""
        return replace(self, base=self.base[rows], merged=self.merged[rows], tuned=self.tuned[rows])

    def transposed(self) -> TensorStep:
        """The same of the transposed matrix: views."""
        return replace(self, base=self.base.mT, merged=self.merged.mT, tuned=self.tuned.mT)

    def delta(self) -> Tensor:
        """Δ_t = θ_t − θ₀, in float32 or wider."""
        return _difference(self.tuned, self.base)

    def vector(self) -> Tensor:
        """M = θ − θ₀ of the step before, in float32 or wider."""
        return _difference(self.merged, self.base)


class Seen(NamedTuple):
    """What a survey takes down of one tensor.

    Attributes:
        numbers: for its `Survey.conclude`; of a tensor that is seen in blocks of rows, their sums.
        aside: tensors that took work and that merging wants again, by names of the survey's own.
    """

    numbers: tuple[float, ...] = ()
    aside: Mapping[str, Tensor] = {}


class Survey(ABC):
    """A pass over all tensors before any is merged.

    Attributes:
        sets_aside: whether `see` leaves all that it finds in what it returns, tensors set aside among it.  So
            a pass that was interrupted goes on in the middle; any other starts again.
    """

    sets_aside: ClassVar[bool] = False

    @abstractmethod
    def see(self, step: TensorStep) -> Seen:
        """Look at one tensor, in the tower's order, or at one block of its rows after another."""

    def counts(self) -> list[Tensor]:
        """What `see` adds up, in place, whole numbers over all tensors that it saw; none where it does not.

        Of several processes each sees some of the tensors, and all go on with the sums.
        """
        return []

    @abstractmethod
    def conclude(self, numbers: Sequence[tuple[float, ...]]) -> Numbers:
        """What was found, from the numbers of every tensor, in the tower's order."""


class Cost(NamedTuple):
    """What merging one tensor takes, in bytes.

    Attributes:
        memory: beside the base's, the merged and the new tensor, at most.
        kept: what is kept of it, beside the merged tensor.
        aside: what surveys set aside of it, after the first model.
    """

    memory: int
    kept: int = 0
    aside: int = 0


class TensorMethod(WeightMethod):
    """A weight method that merges one tensor after another; subclasses give `merge_tensor`.

    Attributes:
        shared: the names of what is kept of all tensors together, numbers in float64.
        copies: how many tensors of the size of the merged one are in memory at once while it is made, itself
            among them.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    #: whether an `update` of the method's own, for many tensors at once, has the bits of `merge_tensor`
    updates_alike: ClassVar[bool] = False
    copies: ClassVar[float] = 5.0

    @abstractmethod
    def merge_tensor(
        self, step: TensorStep, found: Numbers, aside: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        """The new merged tensor, in float32 or wider, and what to keep of it.

        A pure function of its arguments and the options; none is changed.

        Args:
            step: the tensor.
            found: what surveys found, and the `shared` numbers.
            aside: what surveys set aside of this tensor.
        """

    def surveys(self, seen: int) -> int:
        """How many surveys go before merging when that many models arrived before; none with most methods."""
        return 0

    def survey(self, number: int, seen: int, found: Numbers) -> Survey:
        """The survey of that number, from 0.

        Args:
            number: less than `surveys`.
            seen: how many models arrived before.
            found: the `shared` numbers of the step before, and what earlier surveys found.
        """
        raise NotImplementedError

    def in_one_pass(self, seen: int, count: int) -> bool:
        """Whether `count` models can be merged in a single pass, one after another into each tensor.

        That is so where what becomes of a tensor depends on no other.

        Args:
            seen: how many models arrived before.
            count: how many arrive together.
        """
        return not self.shared and not any(map(self.surveys, range(seen, seen + count)))

    def kept_of(self, name: str) -> tuple[str, ...]:
        """The names of what `merge_tensor` keeps of the tensor of that name; no other's has the same."""
        return ()

    def elementwise(self, name: str) -> bool:
        """Whether every entry of the tensor of that name is merged, and surveyed, by itself.

        A large one then goes in blocks of rows, see `mingle.io.lazy_tensors.row_blocks`; what is kept of it
        has its shape.
        """
        return False

    def in_rows(self, name: str) -> bool:
        """Whether the tensor of that name is merged entry by entry, though it may be surveyed as a whole."""
        return self.elementwise(name)

    def cost_of(self, name: str) -> Cost:
        """What merging the tensor of that name takes, from shapes alone."""
        return Cost(round(self.copies * kept_size([self.base[name]])))

    def work_of(self, name: str) -> float:
        """How long merging the tensor of that name takes beside others, from shapes alone."""
        return float(self.base[name].numel())

    def update(self, arrival: Arrival) -> tuple[Tensors, Tensors]:
        found = {name: float(self.state[name]) for name in self.shared if name in self.state}
        aside: dict[str, dict[str, Tensor]] = {}
        for number in range(self.surveys(arrival.index)):
            survey = self.survey(number, arrival.index, found)
            numbers = []
            for step in self._steps(arrival):
                seen = survey.see(step)
                numbers.append(seen.numbers)
                aside.setdefault(step.name, {}).update(seen.aside)
            found |= survey.conclude(numbers)
        merged: Tensors = {}
        state: Tensors = {}
        for step in self._steps(arrival):
            merged[step.name], kept = self.merge_tensor(step, found, aside.pop(step.name, {}))
            state |= kept
        return merged, state | self.shared_tensors(found)

    def shared_tensors(self, found: Numbers) -> Tensors:
        """The `shared` numbers as they are saved, float64 []."""
        return {name: torch.tensor(found[name], dtype=torch.float64) for name in self.shared}

    def _steps(self, arrival: Arrival) -> Iterator[TensorStep]:
        for name, base in self.base.items():
            kept = {key: self.state[key] for key in self.kept_of(name) if key in self.state}
            merged, tuned = self.merged[name], arrival.tuned[name]
            yield TensorStep(name, base, merged, tuned, kept, arrival.index, arrival.seed)


def moved(tensor: Tensor, vector: Tensor, scaling: float = 1.0) -> Tensor:
    """tensor + scaling · vector, in float32, or float64 where the tensor is."""
    return (tensor + scaling * vector).to(wide(tensor))


def _difference(tensor: Tensor, base: Tensor) -> Tensor:
    return tensor.to(wide(tensor)) - base.to(wide(base))
