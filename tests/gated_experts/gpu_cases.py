"""What the tests on a GPU share: arithmetics, shapes, random problems, and the comparison with the formula in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from problems import Problem, laid_out
from torch import Tensor, nn

import mingle

DEVICE = torch.device("cuda")


class Arithmetic(NamedTuple):
    """What products run in: the tensors' dtype, ‖error‖/‖exact‖ that a result may have, and the size of one
    rounding.
    """

    dtype: torch.dtype
    limit: float
    rounding: float


ARITHMETIC = {
    "float32": Arithmetic(torch.float32, 2e-6, 2.0**-23),
    # the units cut operands off after ten bits: each loses up to 2⁻¹⁰, and 0.7 · 2⁻¹⁰ is lost on average
    "tf32": Arithmetic(torch.float32, 2e-3, 2.0**-10),
    "float16": Arithmetic(torch.float16, 1.5e-3, 2.0**-10),
    "bfloat16": Arithmetic(torch.bfloat16, 1e-2, 2.0**-7),
}
BACKENDS = ("triton", "grouped")
GATES = ("token", "sample", "batch", "given token", "given sample", "given batch")


class Shape(NamedTuple):
    """The sizes of one layer and of its input [*leading, d_in]."""

    leading: tuple[int, ...]
    d_in: int
    d_out: int
    experts: int
    rank: int


RAGGED = Shape((3, 37), 77, 131, 5, 17)
SHAPES = {
    "ViT-B/16, four images": Shape((4, 197), 768, 768, 20, 64),
    "ViT-B/32": Shape((16, 50), 768, 3072, 8, 64),
    "one image": Shape((1, 50), 768, 768, 20, 64),
    "ragged": RAGGED,
    "ranks of one": Shape((2, 33), 100, 60, 5, 1),
    "ranks of three": Shape((2, 33), 64, 96, 6, 3),
    "ranks of two hundred": Shape((2, 40), 160, 136, 2, 200),
    "one expert": Shape((4, 50), 256, 256, 1, 16),
    "sixty-four experts": Shape((7, 20), 128, 80, 64, 3),
    "long samples": Shape((2, 800), 768, 64, 3, 16),  # pooled before the shrink launch
    "many experts": Shape((3, 20), 48, 64, 130, 2),  # so are these
    "matrix": Shape((65,), 96, 64, 4, 8),
    "four dimensions": Shape((2, 2, 9), 96, 64, 4, 8),
}


def make(
    shape: Shape,
    dtype: torch.dtype,
    gates: str,
    *,
    zeros: bool = False,
    gate_dtype: torch.dtype | None = None,
    masked: bool = False,
    base: bool = True,
    layouts: dict[str, str] | None = None,
    needs: set[str] | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose outputs are of order 1, the same on every machine.

    Args:
        gates: ``"token"``, ``"sample"`` or ``"batch"``: linear gates so reduced; ``"given …"``: values in
            that shape.
        zeros: all given gates but one of each row are 0.
        base: False sets W₀ and b to 0, so that nothing hides behind them.
        layouts: by tensor name, ``"upstream"`` included.
        needs: names of the tensors that need gradients; all of them where None.
    """
    leading, d_in, d_out, experts, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(name: str, *size: int, terms: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) / math.sqrt(terms)
        return laid_out(values.to(DEVICE, dtype), (layouts or {}).get(name, "plain"))

    tensors = dict(
        x=normal("x", *leading, d_in),
        weight=normal("weight", d_out, d_in, terms=d_in) * base,
        bias=normal("bias", d_out) * base,
        A=normal("A", experts, rank, d_in, terms=d_in),
        B=normal("B", experts, rank, d_out, terms=rank).mT,  # as `MingleLinear` stores it
    )
    options: dict[str, Any] = {}
    if gates.startswith("given"):
        rows = {"batch": (), "sample": leading[:-1], "token": leading}[gates.removeprefix("given ")]
        tensors["gates"] = normal("gates", *rows, experts, dtype=gate_dtype or dtype)
        if zeros:
            chosen = torch.randint(experts, rows, generator=generator).to(DEVICE)
            tensors["gates"] *= nn.functional.one_hot(chosen, experts).to(tensors["gates"].dtype)
    else:
        tensors["gate_weight"] = normal("gate_weight", experts, d_in, terms=d_in, dtype=gate_dtype or dtype)
        tensors["gate_bias"] = normal("gate_bias", experts, dtype=gate_dtype or dtype)
        options["reduce"] = gates
    if masked:
        options["mask"] = (torch.rand(leading, generator=generator) < 0.6).to(DEVICE)
    return Problem(
        tensors,
        options,
        [name for name in tensors if needs is None or name in needs],
        normal("upstream", *leading, d_out),
    )


def distance(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach().double()).norm())


def check(problem: Problem, backend: str, arithmetic: Arithmetic) -> None:
    """Every result of `backend` against the formula in float64."""
    exact, sizes, got = problem.exact(), problem.sizes(), problem.solve(backend)
    for name, value in exact.items():
        tensor = problem.tensors.get(name, problem.tensors["x"])
        assert got[name].dtype == tensor.dtype and got[name].shape == value.shape, name
        allowed = arithmetic.limit * float(value.norm())
        if name.startswith("gate"):  # sums over all tokens, which may cancel to a handful of small numbers
            allowed = max(allowed, arithmetic.rounding * sizes[name])
        assert distance(got[name], value) <= allowed, name


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what `call` launches, and the tensors that a replay writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def layer(backend: str, dtype: torch.dtype = torch.bfloat16) -> mingle.MingleLinear:
    torch.manual_seed(0)
    grown = mingle.MingleLinear.from_linear(
        nn.Linear(96, 72, device=DEVICE, dtype=dtype), "sample", backend=backend
    )
    for _ in range(3):
        A, B = (
            torch.randn(8, 96, device=DEVICE, dtype=dtype) / 96**0.5,
            torch.randn(72, 8, device=DEVICE, dtype=dtype) / 8**0.5,
        )
        grown.add_expert(A, B, gate_bias=0.5)
    return grown
