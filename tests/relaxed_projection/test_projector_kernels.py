"""The projector's Triton kernels against the formula, step by step, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

import torch
from guards import Guard
from hypothesis import given, settings
from mutants import Mutation, applied
from projector_checks import laid_out_steps, projected_steps, strides_do_not_matter
from torch import Tensor

from mingle.adaptation.projector import RelaxedProjector
from mingle.kernels.relaxed_projection import triton as relaxed_projection

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(("rows", "gamma", "steps"), [(1, 0.0, 3), (1, 1.7, 3), (3, 0.0, 3), (3, 1.7, 12)])
def test_many_steps_over_layers_of_all_shapes(rows: int, gamma: float, steps: int) -> None:
    projected_steps([(40, 3), (17, 1), (40, 3), (64, 20), (5, 5), (33, 0), (1, 1)], rows, gamma, steps)


def test_one_layer_with_more_directions_than_a_tile_has_rows() -> None:
    projected_steps([(90, 70)], 1, 1.0)


drawing = settings(deadline=None, derandomize=True, database=None)
Steps = tuple[list[Tensor], list[list[Tensor]]]


@settings(drawing, max_examples=12)
@given(laid_out_steps(torch.float32))
def test_strides_of_bases_and_gradients_do_not_matter(problem: Steps) -> None:
    strides_do_not_matter(*problem, "triton")


@pytest.mark.slow
@settings(drawing, max_examples=100)
@given(laid_out_steps(torch.float32))
def test_strides_of_many_more_bases_and_gradients_do_not_matter(problem: Steps) -> None:
    strides_do_not_matter(*problem, "triton")


def test_flat_gradients_may_have_gaps() -> None:
    projector = RelaxedProjector([torch.linalg.qr(torch.randn(20, 3)).Q], backend="triton")
    layout = projector.layout({"0": 2})
    gaps = torch.randn(2 * layout.size)
    kept, flat = gaps[1::2].clone(), gaps[::2].clone()
    projector.project_(gaps[::2], layout)
    projector.interferences.zero_()
    projector.project_(flat, layout)
    assert torch.equal(gaps[::2], flat) and torch.equal(gaps[1::2], kept)


def test_nothing_is_read_or_written_beyond_the_tensors() -> None:
    projector = RelaxedProjector(
        [torch.linalg.qr(torch.randn(d, k)).Q for d, k in ((20, 3), (37, 5), (37, 1))]
    )
    layout = projector.layout({"0": 2, "1": 1, "2": 3})
    guard, flat = Guard(), torch.randn(layout.size)
    expected, S = flat.clone(), projector.interferences.clone()
    projector.backend = "grouped"
    projector.project_(expected, layout)
    guarded = [guard.around(tensor, dense=True) for tensor in (flat, projector.bases, S)]
    with guard.allocating():
        flags = relaxed_projection.project_(
            guarded[0], layout.table(flat.device), *guarded[1:], 1.0, 0.99, layout.rows, layout.directions
        )
    assert not flags.any()
    torch.testing.assert_close(guarded[0], expected)
    torch.testing.assert_close(guarded[2], projector.interferences)
    for buffer, _ in guard.buffers:
        assert buffer[: Guard.BAND].isnan().all() and buffer[-Guard.BAND :].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_entry_anywhere_stops_all_layers(bad: float) -> None:
    projector = RelaxedProjector([torch.linalg.qr(torch.randn(30, 4)).Q for _ in range(3)], backend="triton")
    grads = [torch.randn(2, 30) for _ in range(3)]
    grads[1][1, 29] = bad
    kept = [grad.clone() for grad in grads]
    assert not projector.apply_(grads)
    assert all(
        torch.equal(grad, before) for grad, before in zip(grads, kept, strict=True) if before.isfinite().all()
    )
    assert not projector.interferences.any()
    grads[1] = torch.randn(2, 30)
    assert projector.apply_(grads) and projector.interferences.all()


MUTATIONS = {
    "λ and 1 − λ swapped": (
        "strength = tl.exp(-gamma * advanced)",
        "strength = 1 - tl.exp(-gamma * advanced)",
    ),
    "the memory's order swapped": (
        "beta * tl.load(s, mask=known, other=0.0) + (1 - beta) * ratio",
        "(1 - beta) * tl.load(s, mask=known, other=0.0) + beta * ratio",
    ),
    "the last direction lost": ("known = directions < K", "known = directions < K - 1"),
    "the sum of the rows' ratios": ("ratio / n.to(tl.float32)", "ratio"),
    "signed interference": (
        "tl.abs(tl.load(along_ptr + place * BLOCK_K + directions))",
        "tl.load(along_ptr + place * BLOCK_K + directions)",
    ),
    "the first row's projection for all": ("(layer * ROWS + row) * BLOCK_K", "layer * ROWS * BLOCK_K"),
    "the end of a wide layer lost": ("square += tl.sum(g * g)", "square = tl.sum(g * g)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_seen(name: str, tmp_path: Path) -> None:
    old, new = MUTATIONS[name]
    with (
        applied(Mutation("mingle.kernels.relaxed_projection.triton", old, new, ""), tmp_path),
        pytest.raises(AssertionError),
    ):
        projected_steps([(700, 13), (17, 2)], 2, 1.7)
