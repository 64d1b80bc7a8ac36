"""A peer: a name and a function that makes a callable of a case's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mingle.bench.check import Outputs
from mingle.bench.inputs import Inputs
from mingle.bench.registry import Case

#: one forward pass, or one forward and backward pass where the case says so
Step = Callable[[], Outputs]


class Unavailable(Exception):
    """A peer cannot run here, or has nothing to do with the case; the message is the reason."""


def _unchanged(inputs: Inputs) -> Inputs:
    return inputs


def _always(case: Case) -> bool:
    return True


@dataclass(frozen=True)
class Peer:
    """One way to compute a case.

    Attributes:
        build: makes the step; raises `Unavailable` with a reason.
        note: what it is, for people.
        adapt: the tensors it works on instead of the case's, with an oracle of their own.
        same: whether it computes the case's function; otherwise it is a bound, never compared with the
            oracle.
        captured: its memory belongs to a CUDA graph, so that peak memory says nothing.
    """

    name: str
    build: Callable[[Inputs], Step]
    note: str
    adapt: Callable[[Inputs], Inputs] = _unchanged
    same: Callable[[Case], bool] = _always
    captured: bool = False


def step(inputs: Inputs, forward: Callable[[], torch.Tensor]) -> Step:
    """`forward` without gradients, or with those of x and the newest gate for the upstream gradient dy."""
    if not inputs.case.backward:

        def infer() -> Outputs:
            with torch.no_grad():
                return {"y": forward()}

        return infer
    wanted = inputs.differentiated()
    names, leaves = tuple(wanted), tuple(wanted.values())

    def train() -> Outputs:
        y = forward()
        return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, inputs.dy), strict=True))}

    return train
