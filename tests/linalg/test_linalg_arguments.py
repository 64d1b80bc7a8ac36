"""What the functions of `mingle.linalg` refuse, by name: other devices, integers, shapes that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mingle import linalg

ARGUMENTS = {
    linalg.extend_basis: dict(U=(6, 2), new=(6, 3)),
    linalg.factored_svd: dict(B=(6, 2), A=(2, 5)),
    linalg.project_out: dict(delta=(6, 5), U=(6, 5), S=(5,), Vh=(5, 5)),
}
CASES = [(function, name) for function, shapes in ARGUMENTS.items() for name in shapes]
cases = pytest.mark.parametrize(
    ("function", "name"), CASES, ids=[f"{function.__name__} {name}" for function, name in CASES]
)


def arguments(function) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in ARGUMENTS[function].items()}
    return tensors | (dict(leading=2) if function is linalg.project_out else {})


@cases
def test_tensors_on_different_devices_are_both_named(function, name):
    given = arguments(function)
    given[name] = given[name].to("meta")
    first, *others = ARGUMENTS[function]
    message = (
        f"{others[0]} is on cpu, {first} on meta" if name == first else f"{name} is on meta, {first} on cpu"
    )
    with pytest.raises(TypeError, match=message):
        function(**given)


@cases
def test_integers_are_refused_by_name(function, name):
    given = arguments(function)
    given[name] = given[name].long()
    with pytest.raises(TypeError, match=f"{name} has dtype torch.int64, expected a floating-point one"):
        function(**given)


def test_matrices_that_do_not_fit_are_named_with_their_shapes():
    with pytest.raises(ValueError, match=r"U \[6, 2\] and new \[5, 2\]: expected \[d, K\] and \[d, k\]"):
        linalg.extend_basis(torch.eye(6)[:, :2], torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"B \[6, 2\] and A \[3, 5\]"):
        linalg.factored_svd(torch.randn(6, 2), torch.randn(3, 5))
