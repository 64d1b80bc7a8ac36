"""Arguments that do not fit are refused by name."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from by_hand import BACKENDS, problem

from mingle.functional import gated_experts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 5, 8, dtype=torch.float64)), r"x has shape \[3, 5, 8\]"),
        (dict(B=torch.zeros(4, 6, 2, dtype=torch.float64)), r"B has shape \[4, 6, 2\], expected \[4, 6, 3\]"),
        (dict(gate_weight=torch.zeros(4, 6, dtype=torch.float64)), "gate_weight has shape"),
        (dict(gate_weight=None), "gate_weight and gate_bias are needed"),
        (dict(mask=torch.ones(3, 4, dtype=torch.bool)), "mask has shape"),
        (dict(reduce="mean"), "reduce='mean'"),
        (dict(backend="cuda"), "backend='cuda'"),
    ],
)
def test_bad_shapes_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        gated_experts(**(problem() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.zeros(4, 3, 7)), "A has dtype torch.float32, weight torch.float64"),
        (dict(mask=torch.ones(3, 5)), "mask has dtype"),
        (dict(A=torch.zeros(4, 3, 7, dtype=torch.float64, device="meta")), "A is on meta, x on cpu"),
    ],
)
def test_mixed_dtypes_and_devices_are_refused(change, message):
    with pytest.raises(TypeError, match=message):
        gated_experts(**(problem() | change))


GATES = dict(gates=torch.rand(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*problem(), "mask", "gates"])
def test_tensors_on_different_devices_are_both_named(name, backend):
    p = problem() | dict(mask=torch.ones(3, 5, dtype=torch.bool)) | (GATES if name == "gates" else {})
    p[name] = p[name].to("meta")
    with pytest.raises(
        TypeError, match="is on cpu, x on meta" if name == "x" else f"{name} is on meta, x on cpu"
    ):
        gated_experts(**p, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(("x", "weight", "bias", "A", "B"), (torch.float32, torch.int64)),
        *product(("gate_weight", "gate_bias"), (torch.int64, torch.complex128)),
        *product(("mask",), (torch.uint8, torch.int64, torch.float32)),
        ("gates", torch.complex128),
    ],
)
def test_mixed_dtypes_are_refused_by_name(name, dtype, backend):
    p = problem() | dict(mask=torch.ones(3, 5, dtype=torch.bool)) | (GATES if name == "gates" else {})
    p[name] = p[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} has dtype|, {name} torch.float32:"):
        gated_experts(**p, backend=backend)
