"""Guard bands: the launchers of the Triton kernels on tensors that lie in larger buffers of NaN."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor


class Guard:
    """Tensors inside larger buffers of NaN (of True for masks), and a check that nothing happened around
    them.
    """

    # elements before and behind: more than a tile reaches, or a fault would end the process
    BAND = 4096
    MARGIN = 3  # elements at both ends of every dimension

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.outputs: list[Tensor] = []

    def around(self, tensor: Tensor, dense: bool = False) -> Tensor:
        """A copy of `tensor` with guards before and behind and, unless it must be `dense`, at both ends of
        every row.
        """
        dense = dense or tensor.dim() < 2
        sizes = list(tensor.shape) if dense else [size + 2 * self.MARGIN for size in tensor.shape]
        buffer = torch.full(
            (math.prod(sizes) + 2 * self.BAND,), tensor.dtype == torch.bool or math.nan, dtype=tensor.dtype
        )
        inner = buffer[self.BAND : -self.BAND].view(sizes)
        if not dense:
            inner = inner[tuple(slice(self.MARGIN, -self.MARGIN) for _ in sizes)]
        inner.copy_(tensor)
        self.buffers.append((buffer, buffer.clone()))
        return inner

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Give launchers outputs of NaN in guarded buffers."""
        original = torch.Tensor.new_empty

        def new_empty(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
            plain = original(tensor, *size, **options)
            if plain.numel() == 0:
                return plain
            self.outputs.append(self.around(plain.fill_(math.nan), dense=True))
            return self.outputs[-1]

        with mock.patch.object(torch.Tensor, "new_empty", new_empty):
            yield

    def check(self) -> None:
        """Outputs are complete; around them, and in the inputs, everything is as it was.  Overwrites the
        outputs.
        """
        for output in self.outputs:
            assert not output.isnan().any(), (
                "an element of an output was not written, or a NaN from outside an input reached it"
            )
            output.fill_(math.nan)
        for buffer, before in self.buffers:
            assert torch.equal(buffer.nan_to_num(7.5), before.nan_to_num(7.5)), (
                "an input was changed, or something outside an output"
            )


class Launch(NamedTuple):
    """A launcher's name, its arguments, and which elements of its first result are defined; None for all."""

    launcher: str
    arguments: tuple[Any, ...]
    named: dict[str, Tensor]
    defined: Tensor | None = None


def _launches() -> dict[str, Launch]:
    groups, group, width, outputs, experts, rank = 3, 7, 33, 40, 3, 5
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tokens = groups * group
    x, dy, hidden = normal(tokens, width), normal(tokens, outputs), normal(tokens, experts * rank)
    weight, bias, A, up = (
        normal(outputs, width),
        normal(outputs),
        normal(experts, rank, width),
        normal(experts, rank, outputs),
    )
    gate_weight, gate_bias, z, token_z = (
        normal(experts, width),
        normal(experts),
        normal(groups, experts),
        normal(tokens, experts),
    )
    mask = torch.rand(tokens, generator=generator) > 0.4
    sparse = z * torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    active = (sparse != 0).repeat_interleave(group, 0).repeat_interleave(rank, 1)  # [N, T·r]
    gates, share = (gate_weight, gate_bias, None), {"share": z, "gate_weight": gate_weight}
    return {
        "shrink-token": Launch("shrink", (x, A, *gates, None, 1, False), {}),
        "shrink-wide-gates": Launch("shrink", (x.half(), A.half(), *gates, None, 1, False), {}),
        "shrink-pooled": Launch("shrink", (x, A, *gates, None, group, False), {}),
        "shrink-masked": Launch("shrink", (x, A, *gates, mask, group, False), {}),
        "shrink-given": Launch("shrink", (x, A, None, None, z, None, group, False), {}),
        "shrink-skip": Launch("shrink", (x, A, None, None, sparse, None, group, True), {}, active),
        "expand": Launch("expand", (x, weight, bias, hidden, up, z, group, False), {}),
        "expand-token": Launch("expand", (x, weight, None, hidden, up, token_z, 1, False), {}),
        "expand-skip": Launch("expand", (x, weight, bias, hidden, up, sparse, group, True), {}),
        "dx": Launch("expand", (dy, weight.mT, None, hidden, A, z, group, False), share),
        "dx-masked": Launch(
            "expand", (dy, weight.mT, None, hidden, A, z, group, False), share | {"mask": mask}
        ),
        "upstream": Launch("upstream", (dy, up.mT, hidden, z, group, False), {}),
        "upstream-skip": Launch("upstream", (dy, up.mT, hidden, sparse, group, True), {}, active),
        "fold": Launch("fold", (weight, A, up.mT, z[0]), {}),
    }


LAUNCHES = _launches()


def guard_bands(name: str) -> None:
    """One launch on guarded tensors gives what the dense products of `grouped` give, and touches nothing
    else.
    """
    launcher, arguments, named, defined = LAUNCHES[name]
    kernels = importlib.import_module(
        "mingle.kernels.gated_experts.fold" if launcher == "fold" else "mingle.kernels.gated_experts.triton"
    )
    grouped = importlib.import_module("mingle.kernels.gated_experts.grouped")
    guard = Guard()
    gates = {"shrink": 4, "expand": 5, "upstream": 3, "fold": 3}[
        launcher
    ]  # the position of z, which must be contiguous
    inside = [
        guard.around(value, dense=i == gates) if isinstance(value, Tensor) else value
        for i, value in enumerate(arguments)
    ]
    named_inside = {key: guard.around(value, dense=key == "share") for key, value in named.items()}
    with guard.allocating():
        results = getattr(kernels, launcher)(*inside, **named_inside)
    expected = getattr(grouped, launcher)(*arguments, **named)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for result, right in zip(results, expected, strict=True):
        if result.numel():  # without gate gradients there are no sums of u ⊙ H
            keep = (
                torch.ones_like(right, dtype=torch.bool)
                if defined is None or defined.shape != right.shape
                else defined
            )
            tolerance = 1e-2 if result.dtype == torch.float16 else 1e-4
            torch.testing.assert_close(
                result[keep], right[keep].to(result.dtype), rtol=tolerance, atol=tolerance
            )
    guard.check()
