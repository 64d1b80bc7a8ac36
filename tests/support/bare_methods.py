"""Methods by themselves, on any module: without a `Merger`, which needs a kind of model for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mingle import methods
from mingle.methods import Arrival, MergeMethod
from mingle.tasks import TaskData, TaskType


class BareTask(TaskType):
    """A language model as it is, whose answer is what comes after the last token."""

    name = "bare"

    def logits(self, model: nn.Module, data: TaskData) -> torch.Tensor:
        logits: torch.Tensor = model(**data.inputs).logits[:, -1]
        return logits


def merged(
    name: str,
    base: nn.Module,
    tuned: Sequence[Mapping[str, torch.Tensor]],
    seeds: TaskData | None = None,
    **options: Any,
) -> MergeMethod:
    """The method after it has taken in models with the states `tuned`, in a copy of `base`."""
    cls = methods.get(name)
    state = {key: tensor.detach() for key, tensor in base.state_dict().items()}
    method = cls(copy.deepcopy(base).eval(), BareTask(), state, cls.Options(**options))
    for index, arriving in enumerate(tuned):

        def teacher(arriving: Mapping[str, torch.Tensor] = arriving) -> nn.Module:
            model = copy.deepcopy(base).eval()
            model.load_state_dict(arriving)
            return model

        method.add(Arrival(index, f"task{index}", arriving, seeds, teacher, seed=index))
    return method


def tuned_states(base: nn.Module, count: int = 3, scale: float = 0.02) -> list[dict[str, torch.Tensor]]:
    """States near that of `base`, each with all its tensors changed; tied ones stay tied."""
    states = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        states.append({key: tensor.detach() for key, tensor in model.state_dict().items()})
    return states
