"""What the Triton kernels must satisfy, as functions that raise AssertionError: for the kernels, and for
mutants that must be caught.  Of parametrised tests those in fp16 are slow; COMPACT has both precisions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from guarded_launches import LAUNCHES, guard_bands
from torch import Tensor

from mingle.functional import gated_experts
from mingle.kernels import tiles
from mingle.kernels.gated_experts import reference

# ‖error‖ / ‖exact‖ of a tensor, as published, and what is no worse than luck: fp16 results are rounded once,
# from fp32 sums; fp32 sums are rounded at every term, and eager PyTorch's order of the terms may happen to be
# the better one for a handful of numbers.
LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3}
FLOORS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11}
TIMES = {torch.float32: 4.0, torch.float16: 2.0}  # of the error of eager PyTorch

DTYPES = [torch.float32, torch.float16]
REDUCTIONS = ["token", "sample", "batch"]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["fp32", "fp16"]
)
reductions = pytest.mark.parametrize("reduce", REDUCTIONS)

Problem = dict[str, Tensor | None]


def problem(
    shape: tuple[int, ...] = (2, 5),
    d_in: int = 33,
    d_out: int = 20,
    experts: int = 3,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    gate_dtype: torch.dtype | None = None,
    base: bool = True,
    seed: int = 0,
) -> Problem:
    """The tensors of one layer, B stored as the layers store it; without `base` W₀ = 0 and no bias, so that
    the experts stand alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, fan: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) / math.sqrt(fan)).to(dtype)

    return {
        "x": normal(*shape, d_in),
        "weight": normal(d_out, d_in, fan=d_in) if base else torch.zeros(d_out, d_in, dtype=dtype),
        "bias": normal(d_out) if base else None,
        "A": normal(experts, rank, d_in, fan=d_in),
        "B": normal(experts, rank, d_out, fan=rank).mT,
        "gate_weight": normal(experts, d_in, fan=d_in, dtype=gate_dtype or dtype),
        "gate_bias": normal(experts, dtype=gate_dtype or dtype),
    }


def given(p: Problem, gates: Tensor) -> Problem:
    """The same layer with given gates instead of linear ones."""
    return p | {"gate_weight": None, "gate_bias": None, "gates": gates}


def random_mask(*shape: int) -> Tensor:
    """A mask with about a third of the tokens invalid; the last sample has no valid token."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.35
    mask[-1] = False
    return mask


def run(
    p: Problem, backend: str, dy: Tensor | None, needs: tuple[str, ...] | None = None, **options: Any
) -> dict[str, Tensor]:
    """y and the gradients of one call by name.

    Args:
        p: arguments of `gated_experts` by name.
        backend: as for `gated_experts`.
        dy: the gradient of y; None for ``y.sum().backward()``, whose gradient has strides of 0.
        needs: the arguments that need a gradient; None for all floating tensors.
        options: further arguments of `gated_experts`.
    """
    wanted = [name for name, value in p.items() if value is not None and (needs is None or name in needs)]
    leaves = {
        name: value if value is None else value.detach().requires_grad_(name in wanted)
        for name, value in p.items()
    }
    y = gated_experts(**leaves, backend=backend, **options)  # type: ignore[arg-type]
    if wanted:
        y.sum().backward() if dy is None else y.backward(dy)
    return {"y": y.detach()} | {name: leaves[name].grad for name in wanted}  # type: ignore[union-attr, misc]


def accurate(
    p: Problem,
    dy: Tensor | str | None = "random",
    needs: tuple[str, ...] | None = None,
    **options: Any,
) -> None:
    """y and every gradient agree with the float64 formula on the rounded inputs, as closely as `compare`
    asks.
    """
    x = p["x"]
    assert x is not None
    if isinstance(dy, str):
        outputs = p["weight"].shape[0]  # type: ignore[union-attr]
        dy = torch.randn(
            *x.shape[:-1], outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64
        ).to(x.dtype)
    wide = {name: None if value is None else value.double() for name, value in p.items()}
    wide_dy = None if dy is None else dy.double()
    exact = run(wide, "eager", wide_dy, needs, **options)
    eager = run(p, "eager", dy, needs, **options)
    scales = gate_gradient_scales(wide, wide_dy, **options)
    for name, result in run(p, "triton", dy, needs, **options).items():
        compare(name, result, exact[name], eager[name], x.dtype, scales.get(name))


def gate_gradient_scales(
    p: Problem, dy: Tensor | None, reduce: str = "sample", mask: Tensor | None = None, **_: Any
) -> dict[str, float]:
    """The norms that the gradients of the gates would have if no term of their sums cancelled another.

    dz_i = Σ u ⊙ H is a sum of signed products over ranks and, for shared gates, tokens; a single number may
    come out near 0, with an error that has nothing to do with its own size.
    """
    x, A, B = p["x"], p["A"], p["B"]
    assert x is not None and A is not None and B is not None
    hidden = torch.einsum("...k,trk->...tr", x, A)
    u = torch.einsum("...o,tor->...tr", x.new_ones(*x.shape[:-1], B.shape[1]) if dy is None else dy, B)
    terms = (u * hidden).abs().sum(-1)  # [..., N, T]
    gates = p.get("gates")
    if gates is None:
        seen = reference.pooled_input(x, reduce, mask).abs().expand(x.shape)
        return {
            "gate_weight": torch.einsum("...t,...k->tk", terms, seen).norm().item(),
            "gate_bias": terms.flatten(0, -2).sum(0).norm().item(),
        }
    if gates.dim() == 1:
        return {"gates": terms.flatten(0, -2).sum(0).norm().item()}
    return {"gates": (terms if gates.dim() == x.dim() else terms.sum(-2)).norm().item()}


def compare(
    name: str,
    result: Tensor,
    exact: Tensor,
    eager: Tensor,
    arithmetic: torch.dtype,
    scale: float | None = None,
) -> None:
    """The error of `result` is within the published limit and at most `TIMES` that of eager PyTorch in
    the same dtype.

    Limits are those of `arithmetic`, the layer's dtype.  Errors are relative to `scale`, by default the norm
    of `exact`; the worst row's to its norm or that of an average row, whichever is larger, for a row, too,
    may cancel to almost nothing.
    """
    assert (result.dtype, result.shape) == (eager.dtype, eager.shape), name
    if exact.numel() == 0:
        return
    scale = scale or exact.norm().item() or 1.0
    difference = result.double() - exact
    own, theirs = difference.norm().item() / scale, (eager.double() - exact).norm().item() / scale
    assert own <= TIMES[arithmetic] * max(theirs, FLOORS[arithmetic]), (
        f"{name}: error {own:.2e}, eager's {theirs:.2e}"
    )
    assert own <= LIMITS[arithmetic], f"{name}: error {own:.2e}"
    rows, right = (tensor.reshape(-1, exact.shape[-1]).norm(dim=1) for tensor in (difference, exact))
    worst = (rows / right.clamp_min(scale / math.sqrt(len(rows)))).max().item()
    assert worst <= 2 * LIMITS[arithmetic], f"{name}: worst row {worst:.2e}"


def one_hot(tokens: int, experts: int) -> Tensor:
    """Gates [tokens, experts] with one expert each, spread over all of them."""
    return torch.eye(experts)[torch.arange(tokens) * (experts - 1) // max(tokens - 1, 1)] * 0.75


def _cancelling_sum() -> None:
    """x W₀ᵀ in fp16 where the second half of the products cancels most of the first: sums in fp16 would lose
    what remains.
    """
    p = given(problem((1, 3), d_in=128, d_out=16, experts=1, dtype=torch.float16), torch.zeros(1)) | {
        "bias": None
    }
    x, weight = p["x"], p["weight"]
    assert x is not None and weight is not None
    x[..., 64:] = 0.05 * x[..., 64:] - x[..., :64]
    weight[:, 64:] = weight[:, :64]
    accurate(p, needs=())


def _with_tile(tile: tiles.Tile, p: Problem) -> None:
    x = p["x"]
    assert x is not None
    with tiles._forced(tile):
        accurate(p, reduce="sample", mask=random_mask(*x.shape[:-1]))


def _gates_of_many_tokens() -> None:
    """A matrix product, with weights in one piece and, for x in half precision, in several."""
    p = problem((40,), d_in=70, experts=35, rank=1)
    wide = problem((40,), d_in=70, experts=35, rank=1, dtype=torch.float16, gate_dtype=torch.float32)
    gates = importlib.import_module("mingle.kernels.gated_experts.gates")  # or a mutant
    pieces = {"PIECES": True, "UPCAST": True, "PRECISION": "ieee"}
    with mock.patch.object(gates, "_MANY_TOKENS", 32):
        accurate(p, needs=(), reduce="token")  # going back, gates are not computed again
        accurate(wide, needs=(), reduce="token")
        x, weight, bias = wide["x"], wide["gate_weight"], wide["gate_bias"]
        assert x is not None and weight is not None and bias is not None
        with mock.patch.object(gates, "_exact_product", return_value=pieces):
            z, _ = gates.gates(x, weight, bias, None, 1)
    exact = torch.addmm(bias.double(), x.double(), weight.double().mT)
    assert (z - exact).norm() <= 2e-6 * exact.norm()


def _large_groups() -> None:
    """Summed in three parts of 64 tokens."""
    p, chip = problem((2, 150), d_in=20, experts=3, rank=1), tiles.INTERPRETER._replace(multiprocessors=4)
    with mock.patch.object(tiles, "chip", return_value=chip):
        accurate(p, needs=(), reduce="sample")
        accurate(p, reduce="sample", mask=random_mask(2, 150))


def top_k(rows: tuple[int, ...], experts: int, k: int, seed: int = 8) -> Tensor:
    """Gates [*rows, experts], of which k in every row are not 0."""
    scores = torch.rand(*rows, experts, generator=torch.Generator().manual_seed(seed))
    return torch.where(scores >= scores.topk(k).values[..., -1:], scores, 0.0)


def sorted_tokens(p: Problem) -> None:
    """Forward and the gradient of x, with tokens sorted by their experts whether that pays or not."""
    listing = importlib.import_module("mingle.kernels.gated_experts.listed")  # or a mutant
    with mock.patch.object(listing, "sorting_pays", return_value=True):
        accurate(p, needs=("x",))


COMPACT: dict[str, Callable[[], None]] = {
    "linear gates of tokens": lambda: accurate(problem((2, 9), rank=17), reduce="token"),
    "linear gates of samples": lambda: accurate(problem((3, 6), rank=40), reduce="sample"),
    "masked samples": lambda: accurate(problem((3, 6)), reduce="sample", mask=random_mask(3, 6)),
    "fold": lambda: accurate(problem((3, 7)), reduce="batch"),
    "experts alone in fp16": lambda: accurate(
        problem((2, 9), dtype=torch.float16, base=False), reduce="sample"
    ),
    "a cancelling sum in fp16": _cancelling_sum,
    "parts of inner products": lambda: _with_tile(
        tiles.Tile(16, 32, 16, 4, 1, splits=3), problem((3, 6), experts=5, rank=17)
    ),
    "descriptors": lambda: _with_tile(
        tiles.Tile(16, 32, 16, 4, 1, described=True),
        problem((3, 25), d_in=40, d_out=56, experts=5, rank=8, dtype=torch.float16),
    ),
    "descriptors at odd ranks": lambda: _with_tile(
        tiles.Tile(16, 32, 16, 4, 1, described=True),
        problem((3, 25), d_in=40, d_out=56, experts=2, rank=12, dtype=torch.float16),
    ),
    "descriptors with parts of experts": lambda: _with_tile(
        tiles.Tile(16, 32, 16, 4, 1, described=True),
        problem((3, 25), d_in=40, d_out=56, experts=3, rank=24, dtype=torch.float16),
    ),
    "gates of many tokens": _gates_of_many_tokens,
    "large groups": lambda: _large_groups(),
    "one expert of many ranks": lambda: accurate(
        given(problem((6, 3), experts=3, rank=40), torch.eye(3)[[0, 1, 2] * 2]), needs=("x",)
    ),
    # on both sides of the first hundred and twenty-eight, which are listed together
    "one expert per sample": lambda: accurate(
        given(problem((6, 3), experts=140, rank=2), torch.eye(140)[[15, 131, 127] * 2]), needs=("x",)
    ),
    "sorted tokens": lambda: sorted_tokens(
        given(problem((6, 9), experts=40, rank=2), top_k((6, 9), experts=40, k=1))
    ),
    "sorted samples": lambda: sorted_tokens(
        given(problem((6, 9), experts=5, rank=6), top_k((6,), experts=5, k=1))
    ),
} | {f"guard bands of {name}": partial(guard_bands, name) for name in LAUNCHES}
