"""TSV-M, Iso-C and WUDI against their formulas, of all task vectors at once."""

from __future__ import annotations

import copy

import pytest
import torch
from bare_methods import merged, tuned_states
from torch import nn
from transformers import BertConfig, BertModel

from mingle.methods import Arrival, get
from mingle.methods.iso_c import isotropic
from mingle.methods.matrixwise import rounding
from mingle.methods.tsv_m import whitened
from mingle.methods.wudi import solved

METHODS = ("tsv-m", "iso-c", "wudi")
#: as many steps as move the matrices by what they are large
ADAM = dict(steps=40, lr=1e-3)
RANK = 3


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return BertModel(config).double().eval()


@pytest.fixture(scope="module")
def states(base):
    return tuned_states(base)


@pytest.fixture(scope="module")
def linear(base):
    return {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def adapted(base, linear):
    """Three models that low-rank adapters were added to."""
    states, generator = [], torch.Generator().manual_seed(1)
    for _ in range(3):
        state = copy.deepcopy(base.state_dict())
        for name in sorted(linear):  # or each process would draw others
            m, n = state[name].shape
            B, A = (torch.randn(shape, generator=generator).double() for shape in ((m, RANK), (RANK, n)))
            state[name] += 0.01 * B @ A
        states.append(state)
    return states


def tsv_m(deltas):
    """The reference of the paper: concatenated singular vectors, each side replaced by its polar factor."""
    keep = min(deltas[0].shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    U = torch.cat([U[:, :keep] for U, _, _ in parts], 1)
    S = torch.cat([S[:keep] for _, S, _ in parts])
    Vh = torch.cat([Vh[:keep] for _, _, Vh in parts])
    (P_u, _, Q_u), (P_v, _, Q_v) = (torch.linalg.svd(x, full_matrices=False) for x in (U, Vh))
    return P_u @ Q_u @ S.diag() @ P_v @ Q_v


def iso_c(deltas):
    U, S, Vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    return S.mean() * U @ Vh


def wudi(deltas):
    """Adam on the loss as the paper has it, differentiated."""
    M = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.Adam([M], lr=ADAM["lr"])
    for _ in range(ADAM["steps"]):
        optimizer.zero_grad()
        loss(M, deltas).backward()
        optimizer.step()
    return M.detach()


def loss(M, deltas):
    return sum(((M - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas)


FORMULAS = {"tsv-m": tsv_m, "iso-c": iso_c, "wudi": wudi}


def options(method):
    return ADAM if method == "wudi" else {}


def task_vectors(base, states):
    start = base.state_dict()
    return [{name: state[name] - tensor for name, tensor in start.items()} for state in states]


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("scaling", [1.0, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_formulas(base, states, linear, method, scaling):
    found = merged(method, base, states, scaling=scaling, **options(method))
    vectors = task_vectors(base, states)
    formula = FORMULAS[method]
    expected = {
        name: tensor
        + scaling * (formula if name in linear else lambda x: sum(x) / len(x))([v[name] for v in vectors])
        for name, tensor in base.state_dict().items()
    }
    assert_same(found.merged, expected, tolerance=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_task_is_served_by_its_own_model(base, states, method):
    found = merged(method, base, states[:1], **options(method)).merged
    if method == "iso-c":  # whose spectrum is another
        assert not torch.allclose(found["pooler.dense.weight"], states[0]["pooler.dense.weight"])
    else:
        assert_same(found, states[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_arrival_makes_no_difference(base, states, method):
    forth, back = (merged(method, base, order, **options(method)).merged for order in (states, states[::-1]))
    assert_same(back, forth, tolerance=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_does_not_grow(base, states, method):
    kept = [merged(method, base, (states * 2)[:count], **options(method)).state for count in (1, 2, 4)]
    first, second, fourth = (sum(tensor.numel() for tensor in state.values()) for state in kept)
    assert first >= second >= fourth


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_goes_on_from_what_is_kept(base, states, method):
    whole = merged(method, base, states, **options(method))
    half = merged(method, base, states[:2], **options(method))
    again = merged(method, base, [], **options(method))
    again.restore([half.task_tensors(i) for i in range(2)], half.state_tensors())
    again.add(Arrival(2, "task2", states[2], None, lambda: base, seed=2))
    assert_same(again.merged, whole.merged, tolerance=0)


def test_wudi_exactly_is_the_minimum(base, states, linear):
    found = merged("wudi", base, states, solver="exact").merged
    vectors, start = task_vectors(base, states), base.state_dict()
    for name in linear:
        deltas = [v[name] for v in vectors]
        M = (found[name] - start[name]).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(M, deltas), M)
        assert gradient.norm() < 1e-9 * sum(deltas).norm()


def test_wudi_exactly_leaves_what_no_task_spans():
    low = [torch.randn(6, 2).double() @ torch.randn(2, 9).double() for _ in range(2)]
    free = torch.linalg.svd(torch.cat(low), full_matrices=True)[2][4:]
    H = sum(d.T @ d / d.square().sum() for d in low)
    N = sum(d @ d.T @ d / d.square().sum() for d in low)
    start = torch.randn(6, 9).double()
    M = solved(start, H, N)
    torch.testing.assert_close(M @ free.T, start @ free.T)
    torch.testing.assert_close(M @ H, N)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 0.1)])
@pytest.mark.parametrize("method", ["tsv-m", "iso-c"])
def test_directions_that_rounding_made_up_take_no_part(base, adapted, linear, method, dtype, limit):
    """Models with adapters, stored in half precision or fp32, differ from the base in noise as well."""
    rounded = [{name: t.to(dtype) for name, t in state.items()} for state in adapted]
    half = copy.deepcopy(base).to(dtype)
    found, exact = merged(method, half, rounded), merged(method, base, adapted)
    before, start = half.state_dict(), base.state_dict()
    for name in linear:
        got = found.merged[name].double() - before[name].double()
        expected = exact.merged[name] - start[name]
        assert int(torch.linalg.matrix_rank(expected, rtol=1e-6)) == len(adapted) * RANK
        assert (got - expected).norm() < limit * expected.norm(), name


def test_iso_c_averages_over_the_directions_that_exist():
    M = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    torch.testing.assert_close(isotropic(M), torch.diag(torch.tensor([3.0, 3.0, 0.0])))
    torch.testing.assert_close(isotropic(M, 3.0), torch.diag(torch.tensor([4.0, 0.0, 0.0])))
    assert torch.equal(isotropic(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_tsv_m_of_a_task_that_came_twice_is_orthonormal_on_what_it_spans():
    U, V = (torch.linalg.qr(torch.randn(n, 2).double())[0] for n in (6, 5))
    S = torch.tensor([3.0, 1.0]).double()
    twice = whitened(torch.cat([U, U], 1), torch.cat([S, S]), torch.cat([V, V], 1).mT)
    torch.testing.assert_close(twice, U @ S.diag() @ V.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_what_rounding_does(dtype):
    W = torch.randn(48, 80).double() / 7
    delta = 0.05 * torch.randn(48, 80).double()
    error = (W + delta).to(dtype).double() - W.to(dtype).double() - delta
    bound = rounding(W.to(dtype), dtype)
    assert 0.3 * bound < torch.linalg.matrix_norm(error, 2) < bound


def test_rounding_of_small_matrices_scatters_but_not_beyond_the_bound():
    for _ in range(300):
        W, delta = (torch.randn(16, 16).double() * scale for scale in (0.02, 0.01))
        error = (W + delta).half().double() - W.half().double() - delta
        assert torch.linalg.matrix_norm(error, 2) < rounding(W.half(), torch.float16)


def test_a_task_that_changed_nothing_changes_nothing(base, states):
    same = copy.deepcopy(base.state_dict())
    for method in ("wudi", "iso-c"):
        with_it, without = (
            merged(method, base, order, **options(method)).merged["pooler.dense.weight"]
            for order in ([*states[:2], same], states[:2])
        )
        torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_equal_to_the_base_leaves_the_base(base, method):
    found = merged(method, base, [base.state_dict()] * 2, **options(method)).merged
    assert_same(found, dict(base.state_dict()), tolerance=0)
    assert get(method).needs_seeds is False
