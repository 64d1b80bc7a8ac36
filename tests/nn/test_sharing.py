"""q, k and v computed with one pass over their input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mingle
from mingle import functional
from mingle.nn.linear import MingleLinear
from mingle.ops.side_by_side import together


class Attention(nn.Module):
    """Reads its projections as transformer blocks do."""

    def __init__(self, width=8, bias=True):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, out, bias=bias) for out in (width, width, width - 2)
        )
        self.memory = None

    def forward(self, x):
        source = x if self.memory is None else self.memory
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return torch.softmax(q @ k.mT, -1) @ v


def attention(reduce="sample", experts=(2, 2, 2), rank=3, bias=True) -> Attention:
    torch.manual_seed(0)
    module = Attention(bias=bias).double()  # a softmax enlarges what fp32 rounds
    for layer, count in zip(
        mingle.inject(module, ("q_proj", "k_proj", "v_proj"), reduce).values(), experts, strict=True
    ):
        for _ in range(count):
            layer.add_expert(torch.randn(rank, 8), torch.randn(layer.out_features, rank), gate_bias=0.3)
    return module


@pytest.fixture
def shrinks(monkeypatch):
    """How many layers each shrink served."""
    served = []
    original = functional.gated_experts_shared

    def spy(x, layers, **options):
        served.append(len(layers))
        return original(x, layers, **options)

    monkeypatch.setattr(functional, "gated_experts_shared", spy)
    return served


def gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_layers_on_their_own(reduce, bias, shrinks):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    alone = attention(reduce, experts=(2, 1, 3), bias=bias)
    together = copy.deepcopy(alone)
    assert mingle.share_inputs(together) == [("q_proj", "k_proj", "v_proj")]
    for expected, got in zip(gradients(alone, x), gradients(together, x), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(together(x), alone(x))
    assert shrinks == [3, 3]


def test_old_gates_alone_cost_no_gradient_of_the_input():
    alone = attention()
    together = copy.deepcopy(alone)
    mingle.share_inputs(together)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    for module in (alone, together):
        module(x).sum().backward()
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad)


def test_cross_attention_is_found_out_once(shrinks):
    module, x = attention(), torch.randn(2, 4, 8, dtype=torch.float64)
    module.memory = torch.randn(2, 6, 8, dtype=torch.float64)
    expected = module(x)
    mingle.share_inputs(module)
    for _ in range(3):
        torch.testing.assert_close(module(x), expected)
    assert shrinks == [3]


def test_nothing_is_kept_once_all_have_answered():
    module = attention()
    mingle.share_inputs(module)
    module(torch.randn(2, 4, 8, dtype=torch.float64))
    group, _ = module.q_proj.shared
    assert group._call is None and group._waiting == []


def test_a_change_of_grad_mode_between_siblings_computes_anew():
    module, x = attention(), torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mingle.share_inputs(module)
    with torch.no_grad():
        module.q_proj(x)
    assert module.k_proj(x).requires_grad


@pytest.mark.parametrize("experts", [(2, 0, 2), (0, 0, 0)])
def test_layers_without_experts_fall_back(experts):
    alone = attention(experts=experts)
    together = copy.deepcopy(alone)
    mingle.share_inputs(together)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    assert torch.equal(together(x), alone(x))


def test_different_ranks_fall_back():
    alone = attention(experts=(1, 1, 1))
    alone.q_proj.add_expert(torch.randn(5, 8), torch.randn(8, 5))
    together = copy.deepcopy(alone)
    mingle.share_inputs(together)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(together(x), alone(x))


def test_experts_added_later_are_shared_too():
    alone = attention()
    together = copy.deepcopy(alone)
    mingle.share_inputs(together)
    A, B = torch.randn(3, 8), torch.randn(8, 3)
    for module in (alone, together):
        torch.manual_seed(1)
        module.k_proj.add_expert(A, B)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(together(x), alone(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_share_among_themselves(copied):
    module = attention()
    mingle.share_inputs(module)
    twin = copied(module)
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(twin(x), module(x))
    assert twin.q_proj.shared[0].layers[1] is twin.k_proj
    assert set(twin.state_dict()) == set(attention().state_dict())


@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_compiles_without_a_graph_break(reduce):
    torch._dynamo.reset()
    module, x = attention(reduce), torch.randn(3, 5, 8, dtype=torch.float64)
    mingle.share_inputs(module)
    expected = gradients(module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(gradients(compiled, x), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_the_experts_of_siblings_move_into_one_buffer():
    module = attention()
    mingle.share_inputs(module)
    before = [layer.A.clone() for layer in (module.q_proj, module.k_proj, module.v_proj)]
    module(torch.randn(2, 4, 8, dtype=torch.float64))
    after = [layer.A for layer in (module.q_proj, module.k_proj, module.v_proj)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert together(after) is not None
    assert len({A.untyped_storage().data_ptr() for A in after}) == 3  # or savers would take them for tied
    assert together([layer.A for layer in copy.deepcopy(module).children()][:3]) is None
    module.load_state_dict(attention().state_dict())


def test_names_the_layers_that_are_not_there():
    module = attention()
    with pytest.raises(ValueError, match=r"q_proj, o_proj side by side"):
        mingle.share_inputs(module, [("q_proj", "o_proj")])
    assert isinstance(module.q_proj, MingleLinear) and module.q_proj.shared is None


class GatedFeedForward(nn.Module):
    """As in Llama (gate_proj, up_proj) or T5 (wi_0, wi_1)."""

    def __init__(self, gate, up):
        super().__init__()
        self.names = gate, up
        for name in self.names:
            self.add_module(name, nn.Linear(8, 12, bias=False))
        self.down_proj = nn.Linear(12, 8, bias=False)

    def forward(self, x):
        gate, up = (getattr(self, name)(x) for name in self.names)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj"), ("wi_0", "wi_1")], ids=str)
def test_gate_and_up_share_their_input_by_default(names, shrinks):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": attention(), "mlp": GatedFeedForward(*names).double()})
    for layer in mingle.inject(model["mlp"], names, "token").values():
        layer.add_expert(torch.randn(3, 8), torch.randn(12, 3), gate_bias=0.3)
    alone = copy.deepcopy(model["mlp"])
    assert mingle.share_inputs(model) == [
        tuple(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        tuple(f"mlp.{name}" for name in names),
    ]
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for expected, got in zip(gradients(alone, x), gradients(model["mlp"], x), strict=True):
        torch.testing.assert_close(got, expected)
    assert shrinks == [2]


def test_a_model_without_any_known_group_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"known groups: q_proj, k_proj, v_proj; .*gate_proj, up_proj"):
        mingle.share_inputs(nn.Linear(2, 2))


def test_opcheck():
    x = torch.randn(6, 5, requires_grad=True)
    layers = [
        functional.LayerTensors(
            torch.randn(d, 5), torch.randn(d), torch.randn(n, 2, 5), torch.randn(n, d, 2),
            torch.randn(n, 5, requires_grad=True), torch.randn(n, requires_grad=True),
        )
        for d, n in ((4, 3), (3, 2))
    ]  # fmt: skip
    weights, biases, As, Bs, gate_weights, gate_biases = map(list, zip(*layers, strict=True))
    for mask in (None, torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)):
        from mingle import ops

        torch.library.opcheck(
            ops.gated_experts_shared,
            (x, weights, biases, As, Bs, gate_weights, gate_biases, mask, 3, [1, 1], True, "grouped"),
        )
