"""The relaxed projector, step by step against the formulas."""

from __future__ import annotations

import logging
import math

import pytest
import torch

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


def test_a_gradient_that_is_not_finite_changes_nothing(caplog):
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


def test_mismatches_are_refused():
    projector = RelaxedProjector(bases((5, 2)))
    with pytest.raises(ValueError, match=r"layer '0': gradient has shape \[1, 4\], expected \[n, 5\]"):
        projector.apply_([torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="'1'"):
        projector.apply_([torch.zeros(1, 5), torch.zeros(1, 5)])
    for wrong in (dict(beta=1.0), dict(gamma=-1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RelaxedProjector(bases((5, 2)), **wrong)
