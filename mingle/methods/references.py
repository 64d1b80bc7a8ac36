"""The two reference rows of every table: the base model as it is, and every task's own model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mingle.methods.base import (
    Arrival,
    Kept,
    Left,
    MergeMethod,
    SavedTasks,
    StepReport,
    Tensors,
    kept_size,
    others,
)
from mingle.tasks import TaskType


class PreTrained(MergeMethod):
    """The base model; merging changes nothing."""

    name = "pre-trained"
    interferes = False

    def add(self, arrival: Arrival) -> StepReport:
        return StepReport()

    def plain_tower(self) -> Tensors:
        return dict(self.base)

    def task_tensors(self, index: int) -> Tensors:
        return {}

    def state_tensors(self) -> Tensors:
        return {}

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        pass

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        return Left(others(index, tasks), {}, [])


class Individual(MergeMethod):
    """Every task served by its own fine-tuned model: the ceiling, at the price of keeping all of them.

    The model holds the newest task's tower until `select` asks for another.
    """

    name = "individual"
    per_task = True
    interferes = False

    def __init__(
        self, model: nn.Module, task: TaskType, base: Mapping[str, torch.Tensor], options: Any
    ) -> None:
        super().__init__(model, task, base, options)
        self.towers: list[Tensors] = []

    def add(self, arrival: Arrival) -> StepReport:
        self.towers.append({name: tensor.to(self.base[name]) for name, tensor in arrival.tuned.items()})
        self.select(arrival.index)
        return StepReport()

    def kept_bytes(self) -> Kept:
        return Kept(kept_size(self.base.values()), 0)

    def plain_tower(self) -> Tensors:
        return self.tower.state_dict()

    def task_tensors(self, index: int) -> Tensors:
        return self.towers[index]

    def state_tensors(self) -> Tensors:
        return {}

    def restore(self, tasks: SavedTasks, state: Tensors) -> None:
        self.towers = [dict(tensors) for tensors in tasks]
        if tasks:
            self.select(len(tasks) - 1)

    def without(self, index: int, tasks: list[Tensors]) -> Left:
        return Left(others(index, tasks), {}, [])

    def select(self, index: int) -> None:
        self.tower.load_state_dict(self.towers[index])
