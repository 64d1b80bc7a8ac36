"""The launchers of the Triton kernels on tensors with guard bands."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple
from unittest import mock

import torch
from guards import Guard
from torch import Tensor


class Launch(NamedTuple):
    """A launcher's name, its arguments, and which elements of its first result are defined; None for all.

    With `active` the launch passes over gates of 0, of tokens in their own order or sorted ones.
    """

    launcher: str
    arguments: tuple[Any, ...]
    named: dict[str, Tensor]
    defined: Tensor | None = None
    active: str | None = None  # "in order" or "sorted"


ORDERS = "in order", "sorted"


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
    gates, share = (gate_weight, gate_bias), {"share": z, "gate_weight": gate_weight}
    dx = (dy, weight.mT, None, hidden, hidden, A, z, group, None)
    return {
        "gates-token": Launch("gates", (x, *gates, None, 1), {}),
        "gates-wide": Launch("gates", (x.half(), *gates, None, 1), {}),
        "gates-pooled": Launch("gates", (x, *gates, None, group), {}),
        "gates-masked": Launch("gates", (x, *gates, mask, group), {}),
        "shrink": Launch("shrink", (x, A, z, group, None), {}),
        "shrink-token": Launch("shrink", (x, A, token_z, 1, None), {}),
        **{f"shrink-{order}": Launch("shrink", (x, A, sparse, group), {}, active, order) for order in ORDERS},
        "expand": Launch("expand", (x, weight, bias, hidden, hidden, up, z, group, None), {}),
        **{
            f"expand-{order}": Launch(
                "expand",
                (x, weight, bias, hidden, hidden * active, up, sparse, group),
                {},
                active=order,
            )
            for order in ORDERS
        },
        "dx": Launch("expand", dx, share),
        "dx-masked": Launch("expand", dx, share | {"mask": mask}),
        "upstream": Launch("upstream", (dy, up.mT, hidden, z, group, None), {}),
        **{
            f"upstream-{order}": Launch("upstream", (dy, up.mT, hidden, sparse, group), {}, active, order)
            for order in ORDERS
        },
        "fold": Launch("fold", (weight, A, up.mT, z[0]), {}),
    }


LAUNCHES = _launches()


def guard_bands(name: str) -> None:
    """One launch on guarded tensors gives what the dense products of `grouped` give, and touches nothing
    else.
    """
    launcher, arguments, named, defined, order = LAUNCHES[name]
    kernels = importlib.import_module(
        "mingle.kernels.gated_experts.fold" if launcher == "fold" else "mingle.kernels.gated_experts.triton"
    )
    grouped = importlib.import_module("mingle.kernels.gated_experts.grouped")
    listing = importlib.import_module("mingle.kernels.gated_experts.listed")
    guard = Guard()
    # the position of z, which must be contiguous
    gates = {"gates": None, "shrink": 2, "expand": 6, "upstream": 3, "fold": 3}[launcher]
    given = list(arguments)
    if order is not None:
        assert gates is not None
        x, z, group = arguments[0], arguments[gates], arguments[gates + 1]
        with guard.allocating(), mock.patch.object(listing, "sorting_pays", return_value=order == "sorted"):
            active = kernels.active(x, 1, 1, guard.around(z, dense=True), group)
        positions = torch.arange(len(x))
        if active.order is not None:
            positions = (active.order.long()[:, None] * group + torch.arange(group)).flatten()
        if launcher == "expand":
            given[4] = arguments[4][positions]
    inside = [
        guard.around(value, dense=i == gates) if isinstance(value, Tensor) else value
        for i, value in enumerate(given)
    ]
    named_inside = {key: guard.around(value, dense=key == "share") for key, value in named.items()}
    last = () if order is None else (active,)
    with guard.allocating():
        results = getattr(kernels, launcher)(*inside, *last, **named_inside)
    expected = getattr(grouped, launcher)(*arguments, *last, **named)
    if launcher == "shrink":
        hidden, z, group = expected[0], *arguments[2:4]
        expected = hidden, grouped.gate(hidden, z, group)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for result, right in zip(results, expected, strict=True):
        if result.numel():  # without gate gradients there are no sums of u ⊙ H
            if order is not None and launcher != "expand":  # by position
                result = torch.empty_like(result).index_copy_(0, positions, result)
            keep = (
                torch.ones_like(right, dtype=torch.bool)
                if defined is None or defined.shape != right.shape
                else defined
            )
            tolerance = 1e-2 if result.dtype == torch.float16 else 1e-4
            torch.testing.assert_close(
                result[keep], right[keep].to(result.dtype), rtol=tolerance, atol=tolerance
            )
    guard.check(complete=defined is None)
