"""Random calls of `gated_experts` for hypothesis, and what their results may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from layouts import layouts_of
from problems import Problem, laid_out
from torch import Tensor

# ‖error‖/‖exact‖ that a tensor may have
LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def zeros_in(gates: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Gate rows with exact zeros: none, most of them, or all but one, whose expert comes in order or not."""
    rows = gates.reshape(-1, gates.shape[-1])
    if kind == "many":
        rows = rows * (torch.rand(rows.shape, generator=generator) < 0.2)
    elif kind != "none":
        expert = torch.randint(rows.shape[1], rows.shape[:1], generator=generator)
        expert = expert.sort().values if kind == "sorted" else expert
        rows = rows * torch.nn.functional.one_hot(expert, rows.shape[1]).to(rows.dtype)
    return rows.reshape(gates.shape)


def make(
    leading: tuple[int, ...],
    d_in: int,
    d_out: int,
    experts: int,
    rank: int,
    dtype: torch.dtype,
    gates: str,
    *,
    zeros: str = "none",
    gate_dtype: torch.dtype | None = None,
    masked: bool = False,
    frozen: int = 0,
    layouts: dict[str, str] | None = None,
    needs: set[str] | None = None,
    seed: int = 0,
) -> Problem:
    """A random problem whose outputs are of order 1.

    Args:
        gates: ``"token"``, ``"sample"`` or ``"batch"``: linear gates so reduced; ``"given …"``: values in
            that shape.
        layouts: by tensor name, ``"upstream"`` included.
        needs: names of the tensors that need gradients; all of them where None.
    """
    generator = torch.Generator().manual_seed(seed)
    layouts = layouts or {}

    def normal(name: str, *shape: int, terms: int = 1, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(terms)
        return laid_out(values.to(dtype), layouts.get(name, "plain"))

    tensors = dict(
        x=normal("x", *leading, d_in),
        weight=normal("weight", d_out, d_in, terms=d_in),
        bias=normal("bias", d_out),
        A=normal("A", experts, rank, d_in, terms=d_in),
        B=normal("B", experts, d_out, rank, terms=rank),
    )
    options: dict[str, Any] = dict(frozen_gates=frozen)
    if gates.startswith("given"):
        shape = {"batch": (), "sample": leading[:-1], "token": leading}[gates.removeprefix("given ")]
        tensors["gates"] = zeros_in(
            normal("gates", *shape, experts, dtype=gate_dtype or dtype), zeros, generator
        )
    else:
        tensors["gate_weight"] = normal("gate_weight", experts, d_in, terms=d_in, dtype=gate_dtype or dtype)
        tensors["gate_bias"] = normal("gate_bias", experts, dtype=gate_dtype or dtype)
        options["reduce"] = gates
    if masked:
        options["mask"] = torch.rand(leading, generator=generator) < 0.6
    return Problem(
        tensors,
        options,
        [name for name in tensors if needs is None or name in needs],
        normal("upstream", *leading, d_out),
    )


GATES = ("token", "sample", "batch", "given token", "given sample", "given batch")
NEEDS = (
    None,
    set(),
    {"x"},
    {"gate_weight", "gate_bias", "gates"},
    {"x", "gate_weight", "gate_bias", "gates"},
    {"A"},
    {"B", "gate_bias"},
    {"weight", "bias"},
)


# its mask in one dimension is a view with the strides of the one given
one_sample = st.tuples(st.just(1), st.integers(2, 8))


@st.composite
def problems(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = tuple(LIMITS), widest: int = 20) -> Problem:
    """Calls with every combination of shapes, dtypes and gates, every tensor laid out anyhow."""
    dtype = draw(st.sampled_from(sorted(dtypes, key=str)))
    experts = draw(st.integers(1, 9))
    problem = make(
        draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple) | one_sample),
        draw(st.integers(1, widest)),
        draw(st.integers(1, widest)),
        experts,
        draw(st.integers(1, 6)),
        dtype,
        draw(st.sampled_from(GATES)),
        zeros=draw(st.sampled_from(["none", "many", "sorted", "shuffled"])),
        gate_dtype=draw(st.sampled_from([None, torch.promote_types(dtype, torch.float32)])),
        masked=draw(st.sampled_from([True, True, True, False])),
        frozen=draw(st.integers(0, experts)),
        needs=draw(st.sampled_from(NEEDS)),
        seed=draw(st.integers(0, 1 << 20)),
    )
    lies = draw(layouts_of(*problem.tensors, "mask", "upstream"))
    return problem._replace(
        tensors={name: lies[name].of(tensor) for name, tensor in problem.tensors.items()},
        options={
            name: lies[name].of(value) if name == "mask" else value for name, value in problem.options.items()
        },
        upstream=lies["upstream"].of(problem.upstream),
    )


def is_the_formula(problem: Problem, backend: str) -> None:
    """y and every gradient agree with the formula in float64, as closely as their dtype allows."""
    exact, sizes, got = problem.exact(), problem.sizes(), problem.solve(backend)
    dtype = problem.tensors["x"].dtype
    for name, value in exact.items():
        tensor = problem.tensors.get(name, problem.tensors["x"])
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == value.shape, name
        # a term of dx is rounded four times (u, its gate, their product, the sum so far), each by half an eps
        # at most, and with the few terms of these tensors nothing averages out
        allowed = max(LIMITS[dtype] * float(value.norm()), 2 * torch.finfo(dtype).eps * sizes[name])
        assert (got[name].double() - value).norm() <= allowed, name
