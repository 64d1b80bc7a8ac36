"""Packed copies of frozen weights: the same results, never a stale one, and nothing left once the layer is
gone.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mingle
from mingle.kernels import gemm, prepack
from mingle.kernels.gated_experts import grouped
from mingle.nn.linear import MingleLinear

LIMITS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
REDUCTIONS = ("token", "sample", "batch")


@pytest.fixture(autouse=True)
def _onednn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small products too, in memory of their own."""
    if not gemm._packed_agrees(torch.float32):
        pytest.skip("this PyTorch packs no weights")
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    monkeypatch.setattr(prepack, "_copies", {})


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts that were asked for and there, in order."""
    calls: list[str] = []
    plain = prepack.find

    def find(layout: str, *factors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor | None:
        found = plain(layout, *factors, **options)
        if found is not None:
            calls.append(layout)
        return found

    monkeypatch.setattr(prepack, "find", find)
    return calls


def grown(
    reduce: str = "sample", dtype: torch.dtype = torch.float32, bias: bool = True, packed: bool = True
) -> MingleLinear:
    torch.manual_seed(0)
    layer = MingleLinear.from_linear(nn.Linear(24, 20, bias=bias), reduce, prepack=packed)
    for i in range(3):
        layer.add_expert(
            torch.randn(4, 24) / 5, torch.randn(20, 4) / 2, gate_weight=torch.randn(24), gate_bias=0.5 * i
        )
    return layer.to(dtype)


def expected(layer: MingleLinear, x: torch.Tensor) -> torch.Tensor:
    exact = copy.deepcopy(layer).double()
    exact.backend = "eager"
    return exact(x.double())


def check(layer: MingleLinear, x: torch.Tensor) -> None:
    exact = expected(layer, x)
    assert (layer(x).double() - exact).norm() <= LIMITS[x.dtype] * exact.norm()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (40, 5), (5,)])
def test_equals_the_formula(dtype, reduce, bias, shape, used):
    if not gemm._packed_agrees(dtype):
        pytest.skip(f"this PyTorch packs no weights of {dtype}")
    layer = grown(reduce, dtype, bias)
    with torch.no_grad():
        check(layer, torch.randn(*shape, 24, dtype=dtype))
    folded = reduce == "batch" and torch.Size(shape).numel() > 20 * 24 / 44
    assert used == (["rows"] if folded else ["shrink", "joined"])


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded rows"])
def test_any_strides_of_x(layout):
    layer, x = grown(), torch.randn(6, 48)
    x = {
        "transposed": x[:, :24].T.contiguous().T,
        "every other": x[:, ::2],
        "expanded rows": x[:1, :24].expand(6, 24),
    }[layout]
    with torch.no_grad():
        check(layer, x)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients_are_those_of_the_layer_without(reduce, used):
    plain, packed = grown(reduce, packed=False), grown(reduce)
    results = []
    for layer in (plain, packed):
        x = torch.linspace(-1, 1, 3 * 5 * 24).view(3, 5, 24).requires_grad_()
        y = layer(x)
        results.append(
            (
                y,
                *torch.autograd.grad(
                    y, [x, layer.gate_weight, layer.gate_bias], torch.linspace(1, 2, y.numel()).view_as(y)
                ),
            )
        )
    assert used
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_experts_that_learn_are_followed(used):
    layer, x = grown(), torch.randn(3, 5, 24)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        check(layer, x)
    assert used


def changes() -> dict[str, object]:
    def in_place(layer: MingleLinear, name: str) -> None:
        with torch.no_grad():
            getattr(layer, name).mul_(3)

    def through_a_view(layer: MingleLinear) -> None:
        layer.B.detach()[1] = 0

    def another_state(layer: MingleLinear) -> None:
        other = grown()
        for parameter in other.parameters():
            parameter.data.normal_()
        layer.load_state_dict(other.state_dict())

    def inferred(layer: MingleLinear) -> None:
        with torch.inference_mode():
            layer.A.mul_(2)

    def replaced(layer: MingleLinear) -> None:
        layer.weight.data = layer.weight.data * 2

    def expert(layer: MingleLinear) -> None:
        layer.add_expert(torch.randn(6, 24), torch.randn(20, 6), gate_bias=1.0)

    return {
        **{
            f"{name} in place": lambda layer, name=name: in_place(layer, name)
            for name in ("weight", "A", "B_transposed", "bias")
        },
        "a view in place": through_a_view,
        "load_state_dict": another_state,
        "in inference mode": inferred,
        "data": replaced,
        "add_expert": expert,
        "set_trainable_gates": lambda layer: layer.set_trainable_gates(3),
        "to another dtype and back": lambda layer: layer.to(torch.bfloat16).float(),
    }


@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("change", changes())
def test_a_stale_copy_is_never_used(change, reduce, used):
    layer, x = grown(reduce), torch.randn(6, 5, 24)
    with torch.no_grad():
        for _ in range(3):
            check(layer, x)
            changes()[change](layer)
            used.clear()
            check(layer, x)
            assert used  # of new copies
    assert sorted(key[0] for key in prepack._copies) == ["joined", "kept", "rows", "shrink"]
    assert all(found.current() for found in prepack._copies.values())


def test_operators_see_through_a_change_that_no_layer_has_noticed():
    weight, A, up = torch.randn(20, 24), torch.randn(3, 4, 24), torch.randn(3, 4, 20)
    prepack.keep(weight, A, up)
    assert prepack.find("joined", weight, up) is not None
    assert prepack.find("joined", weight.view(20, 24), up.mT.mT) is not None  # the same memory
    for other in (weight[:10], weight.T, weight.clone()):
        assert prepack.find("joined", other, up) is None
    up.mul_(2)
    assert prepack.find("joined", weight, up) is None
    assert prepack.find("shrink", A) is not None
    prepack.drop_stale()
    assert len(prepack._copies) == 1


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_layer_pack_for_themselves(clone, used):
    layer, x = grown(), torch.randn(3, 5, 24)
    with torch.no_grad():
        y = layer(x)
        twin = clone(layer)
        size = len(pickle.dumps(layer))
        assert twin.prepack and torch.equal(twin(x), y)
        twin.A.zero_()
        check(twin, x)
        assert torch.equal(layer(x), y)
    assert (
        size == len(pickle.dumps(grown()))
        and layer.state_dict().keys() == grown(packed=False).state_dict().keys()
    )


def test_nothing_is_left_of_a_layer_that_is_gone():
    layer = grown()
    with torch.no_grad():
        layer(torch.randn(3, 5, 24))
    packed = [weakref.ref(found._tensor) for found in prepack._copies.values() if found._tensor is not None]
    assert len(packed) == 2
    del layer
    gc.collect()
    assert not prepack._copies
    assert not any(reference() is not None for reference in packed)


def test_only_what_is_used_is_packed():
    low_rank, folded = grown("sample"), grown("batch")
    with torch.no_grad():
        low_rank(torch.randn(3, 5, 24)), folded(torch.randn(3, 5, 24))
    assert [key[0] for key, found in prepack._copies.items() if found._tensor is not None] == [
        "joined",
        "shrink",
        "rows",
    ]


def test_asked_for_by_inject_and_only_then():
    for asked in (False, True):
        model = nn.Sequential(nn.Linear(24, 20))
        (layer,) = mingle.inject(model, "0", prepack=asked).values()
        x = torch.randn(2, 3, 24)
        # no experts: the base, bit for bit
        assert torch.equal(model(x), F.linear(x, layer.weight, layer.bias))
        layer.add_expert(torch.randn(2, 24), torch.randn(20, 2))
        model(x)
        assert bool(prepack._copies) == asked


def test_other_products_than_those_of_fast_libraries_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "mkl")
    plain, packed, x = grown(packed=False), grown(), torch.randn(3, 5, 24)
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(packed.double()(x.double()), plain.double()(x.double()))


def test_without_the_library_nothing_changes(monkeypatch):
    def absent(*arguments):
        raise RuntimeError("not built with oneDNN")

    monkeypatch.setattr(gemm, "pack", absent)
    gemm._packed_agrees.cache_clear()
    try:
        plain, packed, x = grown(packed=False), grown(), torch.randn(3, 5, 24)
        assert torch.equal(packed(x), plain(x))
    finally:
        monkeypatch.undo()
        gemm._packed_agrees.cache_clear()


def test_autocast_computes_as_without():
    plain, packed, x = grown(packed=False), grown(), torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), plain(x))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_compiles_without_a_graph_break(reduce):
    torch._dynamo.reset()
    layer = grown(reduce)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(3, 5, 24)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
            layer.A.mul_(2)
            check(compiled, x)


def test_layers_that_share_their_input_pack_what_they_share(used):
    module = nn.Module()
    for name in ("q", "k", "v"):
        module.add_module(name, grown())
    alone, x = copy.deepcopy(module), torch.randn(3, 5, 24)
    mingle.share_inputs(module, [("q", "k", "v")])
    with torch.no_grad():
        for _ in range(2):
            used.clear()
            for name in ("q", "k", "v"):
                torch.testing.assert_close(
                    getattr(module, name)(x), getattr(alone, name)(x), rtol=1e-5, atol=1e-5
                )
            assert used.count("shrink") == 1 + 3 and used.count("joined") == 3 + 3
            module.k.A.mul_(2), alone.k.A.mul_(2)


def test_gates_are_multiplied_into_a_part_of_a_larger_matrix():
    hidden, z, out = torch.randn(6, 8), torch.randn(2, 4), torch.full((6, 20), 7.0)
    wanted = hidden * z.repeat_interleave(3, 0).repeat_interleave(2, 1)
    assert torch.equal(grouped.gate(hidden, z, 3, out=out[:, 5:13]), wanted)
    assert torch.equal(out[:, 5:13], wanted) and (out[:, :5] == 7).all() and (out[:, 13:] == 7).all()
    assert torch.equal(grouped.gate(hidden, z, 3), wanted)
    assert torch.equal(grouped.gate(hidden, z, 3, out=hidden), wanted) and torch.equal(hidden, wanted)
