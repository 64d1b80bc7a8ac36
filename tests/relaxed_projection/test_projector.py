"""The relaxed projector, step by step against the formulas."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projector_checks import laid_out_steps, strides_do_not_matter

from mingle.adaptation.projector import RelaxedProjector

D64 = dict(dtype=torch.float64)


def bases(*widths_and_sizes):
    return [torch.linalg.qr(torch.randn(d, k, **D64)).Q for d, k in widths_and_sizes]


@pytest.mark.parametrize("rows", [1, 3])
def test_hundreds_of_steps_follow_the_formulas(rows):
    U = bases((7, 3), (5, 2))
    gamma, beta = 1.7, 0.9
    projector = RelaxedProjector({"a": U[0], "b": U[1]}, gamma=gamma, beta=beta)
    S = [[0.0] * 3, [0.0] * 2]
    for _ in range(300):
        grads = [torch.randn(rows, u.shape[0], **D64) for u in U]
        expected = []
        for layer, (G, u) in enumerate(zip(grads, U, strict=True)):
            out = G.clone()
            for p in range(u.shape[1]):
                r = sum(abs(float(G[n] @ u[:, p])) / (float(G[n].norm()) + 1e-12) for n in range(rows)) / rows
                S[layer][p] = beta * S[layer][p] + (1 - beta) * r
                lam = math.exp(-gamma * S[layer][p])
                out -= lam * torch.outer(G @ u[:, p], u[:, p])
            expected.append(out)
        assert projector.apply_({"a": grads[0], "b": grads[1]})
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(projector.interference()["a"], torch.tensor(S[0], **D64))
    torch.testing.assert_close(projector.strength()["b"], torch.exp(-gamma * torch.tensor(S[1], **D64)))


def test_hard_projector_annihilates_and_is_idempotent():
    (U,) = bases((9, 4))
    projector = RelaxedProjector([U], gamma=0.0)
    grad = torch.randn(1, 9, **D64)
    projector.apply_([grad])
    assert (grad @ U).abs().max() < 1e-14
    again = grad.clone()
    projector.apply_([again])
    torch.testing.assert_close(again, grad)


def test_no_basis_leaves_the_gradient_and_projection_never_lengthens_it():
    empty = RelaxedProjector([torch.empty(4, 0, **D64)])
    grad = torch.randn(1, 4, **D64)
    kept = grad.clone()
    assert empty.apply_([grad])
    assert torch.equal(grad, kept)
    (U,) = bases((4, 2))
    projector = RelaxedProjector([U], gamma=5.0, beta=0.0)
    for _ in range(20):
        grad = torch.randn(1, 4, **D64)
        length = grad.norm()
        projector.apply_([grad])
        assert grad.norm() <= length


def test_relaxation_lets_go_where_interference_stays():
    (U,) = bases((6, 2))
    projector = RelaxedProjector([U], gamma=3.0, beta=0.5)
    along = []
    for _ in range(20):
        grad = U[:, :1].T.clone()
        projector.apply_([grad])
        along.append(grad.norm().item())
    assert along == sorted(along)
    assert along[-1] > 0.9
    assert projector.strength()["0"][1] == pytest.approx(1)


def test_a_non_finite_gradient_changes_nothing_and_its_layer_is_reported(caplog):
    U = bases((5, 2), (5, 1))
    projector = RelaxedProjector({"good": U[0], "bad": U[1]})
    grads = {"good": torch.randn(1, 5, **D64), "bad": torch.full((1, 5), float("nan"), **D64)}
    kept = grads["good"].clone()
    with caplog.at_level(logging.WARNING):
        assert not projector.apply_(grads)
    assert "bad" in caplog.text
    assert projector.skipped_steps == 1
    assert torch.equal(grads["good"], kept)
    assert not any(s.any() for s in projector.interference().values())


@pytest.mark.parametrize("gamma", [0.0, 1.3])
def test_layers_together_and_layer_by_layer_agree_over_hundreds_of_steps(gamma):
    shapes = [(9, 3), (6, 1), (9, 3), (6, 0), (5, 5)]
    U, rows = bases(*shapes), (2, 1, 2, 3, 1)
    together, apart = (
        RelaxedProjector(U, gamma=gamma, beta=0.9, backend=backend) for backend in ("auto", "eager")
    )
    for step in range(200):
        grads = [torch.randn(n, d, **D64) for n, (d, _) in zip(rows, shapes, strict=True)]
        if step % 17 == 5:
            grads[step % 5][0, -1] = math.inf
        other = [grad.clone() for grad in grads]
        assert together.apply_(grads) == apart.apply_(other) == (step % 17 != 5)
        for grad, expected in zip(grads, other, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    assert together.skipped_steps == 12
    for (name, s), expected in zip(
        together.interference().items(), apart.interference().values(), strict=True
    ):
        torch.testing.assert_close(s, expected, msg=name)


def test_the_flat_gradients_are_views_in_the_projectors_order():
    projector = RelaxedProjector({"a": bases((4, 2))[0], "b": bases((3, 1))[0], "c": bases((4, 2))[0]})
    layout = projector.layout({"a": 1, "b": 2, "c": 1})
    flat = torch.arange(float(layout.size))
    views = layout.views(flat)
    assert {name: view.shape for name, view in views.items()} == {"a": (1, 4), "b": (2, 3), "c": (1, 4)}
    assert sorted(entry for view in views.values() for entry in view.flatten().tolist()) == list(range(14))
    assert all(
        view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in views.values()
    )
    assert projector.layout({"a": 1, "b": 2, "c": 1}) is layout


def test_the_triton_kernels_are_refused_with_the_reason():
    projector = RelaxedProjector(bases((5, 2)), backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: "):
        projector.apply_([torch.zeros(1, 5, **D64)])
    with pytest.raises(ValueError, match="backend='cuda'"):
        RelaxedProjector(bases((5, 2)), backend="cuda")


def test_state_dict_round_trip_continues_alike():
    U = bases((5, 2))
    first, second = RelaxedProjector(U), RelaxedProjector(bases((5, 2)))
    first.apply_([torch.randn(1, 5, **D64)])
    second.load_state_dict(first.state_dict())
    grads = [torch.randn(1, 5, **D64)] * 1
    other = [g.clone() for g in grads]
    first.apply_(grads)
    second.apply_(other)
    assert torch.equal(grads[0], other[0])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(laid_out_steps(torch.float64), st.sampled_from(["auto", "grouped", "eager"]))
def test_strides_of_bases_and_gradients_do_not_matter(problem, backend):
    strides_do_not_matter(*problem, backend)


def test_an_expanded_gradient_is_refused_with_its_strides_before_anything_changes():
    projector = RelaxedProjector({"a": bases((5, 2))[0], "b": bases((5, 2))[0]})
    whole = torch.randn(2, 5, **D64)
    kept = whole.clone()
    expanded = torch.randn(1, 5, **D64).expand(2, 5)
    with pytest.raises(ValueError, match=r"'b': elements of the gradient \[2, 5\] with strides \[0, 1\]"):
        projector.apply_({"a": whole, "b": expanded})
    with pytest.raises(ValueError, match=r"strides \[2, 1\]"):
        projector.apply_({"a": whole, "b": torch.randn(8, **D64).unfold(0, 5, 2)})
    assert torch.equal(whole, kept) and not projector.interferences.any()
    assert projector.apply_({"a": whole, "b": expanded.clone()})


def test_tensors_on_different_devices_are_named():
    U = bases((5, 2), (5, 2))
    with pytest.raises(TypeError, match="layer '1': basis is on meta, layer '0': basis on cpu"):
        RelaxedProjector([U[0], U[1].to("meta")])
    projector = RelaxedProjector(U)
    with pytest.raises(TypeError, match="layer '1': gradient is on meta, the projector on cpu"):
        projector.apply_([torch.zeros(1, 5, **D64), torch.zeros(1, 5, **D64, device="meta")])
    layout = projector.layout({"0": 1, "1": 1})
    with pytest.raises(
        TypeError, match="gradients are torch.float64 on meta, the bases torch.float64 on cpu"
    ):
        projector.project_(torch.zeros(10, **D64, device="meta"), layout)


def test_other_dtypes_are_projected_in_that_of_the_bases_and_written_back_in_their_own():
    U = bases((6, 2))
    for half in (torch.float16, torch.bfloat16):
        projector = RelaxedProjector([U[0].to(half)])
        assert projector.bases.dtype == projector.interferences.dtype == torch.float32
        grad, other = torch.randn(2, 6).to(half), torch.zeros(2, 6, dtype=half)
        grad[1] = 0  # whose norm + 1e-12 would be 0 in fp16
        expected = grad.float()
        RelaxedProjector([U[0].to(half).float()]).apply_([expected])
        assert projector.apply_([grad]) and grad.dtype == half
        assert torch.equal(grad, expected.to(half)) and projector.interferences.isfinite().all()
        assert projector.apply_([other])
    with pytest.raises(TypeError, match="layer '0': gradient has dtype torch.int64"):
        RelaxedProjector(U).apply_([torch.zeros(1, 6, dtype=torch.int64)])
    with pytest.raises(TypeError, match="layer '0': basis has dtype torch.int64"):
        RelaxedProjector([torch.ones(6, 1, dtype=torch.int64)])


def test_an_overflow_in_the_bases_dtype_is_reported_with_its_layer(caplog):
    projector = RelaxedProjector({"small": torch.eye(3)[:, :1], "large": torch.eye(3)[:, :1]})
    assert not projector.apply_({"small": torch.ones(1, 3), "large": torch.full((1, 3), 1e300, **D64)})
    assert "large" in caplog.text and "small" not in caplog.text


def test_a_shape_that_does_not_fit_its_basis_raises():
    projector = RelaxedProjector(bases((5, 2)))
    with pytest.raises(ValueError, match=r"layer '0': gradient has shape \[1, 4\], expected \[n, 5\]"):
        projector.apply_([torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="'1'"):
        projector.apply_([torch.zeros(1, 5), torch.zeros(1, 5)])
    with pytest.raises(ValueError, match=r"gradients has shape \[4\], expected \[5\]"):
        projector.project_(torch.zeros(4, **D64), projector.layout({"0": 1}))
    for wrong in (dict(beta=1.0), dict(gamma=-1.0), dict(gamma=math.inf), dict(gamma=math.nan)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RelaxedProjector(bases((5, 2)), **wrong)
