"""Calls of frozen layers go past everything that is settled already, and nothing else about them differs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from mingle import functional
from mingle.kernels.gated_experts import grouped
from mingle.nn.linear import MingleLinear

#: of x: samples of tokens, rows, one token, one sample, samples in two dimensions
SHAPES = [(4, 5), (6,), (), (1, 7), (2, 3, 4)]


def grown(experts=3, reduce="sample", dtype=torch.float32, bias=True, widths=(8, 6)) -> MingleLinear:
    d_in, d_out = widths
    layer = MingleLinear.from_linear(nn.Linear(d_in, d_out, bias=bias, dtype=dtype), reduce)
    for i in range(experts):
        layer.add_expert(torch.randn(3, d_in), torch.randn(d_out, 3), gate_bias=0.1 * i)
    return layer


def in_general(layer: MingleLinear, x: Tensor) -> Tensor:
    return functional.gated_experts(
        x, *layer.tensors(), reduce=layer.reduce, frozen_gates=layer.frozen_gates, backend=layer.backend
    )


@pytest.fixture
def general_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every call that went the general way."""
    calls: list[int] = []
    plain = functional.gated_experts
    monkeypatch.setattr(
        functional, "gated_experts", lambda *args, **options: (calls.append(1), plain(*args, **options))[1]
    )
    return calls


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator, dtype=y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
@pytest.mark.parametrize("leading", SHAPES)
def test_same_bits_as_the_general_way(dtype, reduce, leading, general_calls):
    for trainable, bias in ((1, True), (3, True), (2, False)):
        layer = grown(reduce=reduce, dtype=dtype, bias=bias)
        layer.set_trainable_gates(trainable)
        x = torch.randn(*leading, 8, dtype=dtype)
        if trainable == 2:
            x = x.repeat_interleave(2, -1)[..., ::2]
        for needs_x in (True, False):
            x.requires_grad_(needs_x)
            needed = [layer.gate_weight, layer.gate_bias, *[x] * needs_x]
            expected = in_general(layer, x)
            general_calls.clear()
            y = layer(x)
            with torch.no_grad():
                untaped = layer(x)
            assert not general_calls
            assert torch.equal(y, expected)
            assert torch.equal(untaped, expected)
            assert y.shape == (*leading, 6)
            for got, wanted in zip(gradients(y, *needed), gradients(expected, *needed), strict=True):
                assert torch.equal(got, wanted)


def has_the_bits_of_the_general_way(layer: MingleLinear, x: torch.Tensor, general_calls: list) -> None:
    expected = in_general(layer, x)
    general_calls.clear()
    y = layer(x)
    assert not general_calls
    assert torch.equal(y, expected)
    for got, wanted in zip(
        gradients(y, x, layer.gate_weight), gradients(expected, x, layer.gate_weight), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_same_bits_where_the_library_is_chosen(reduce, monkeypatch, general_calls):
    monkeypatch.setenv("MINGLE_CPU_GEMM", "onednn")
    layer, x = grown(reduce=reduce, widths=(64, 48)), torch.randn(4, 20, 64, requires_grad=True)
    has_the_bits_of_the_general_way(layer, x, general_calls)


@pytest.mark.parametrize("widths", [(8, 6), (6, 8), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_folds_are_the_formula(widths, dtype, monkeypatch):
    monkeypatch.setattr(grouped, "_LARGE", 1)
    layer, x = grown(reduce="batch", dtype=dtype, widths=widths), torch.randn(4, 20, widths[0]).to(dtype)
    exact = copy.deepcopy(layer).double()
    exact.backend = "eager"
    expected = exact(x.double())
    assert (layer(x) - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_old_gates_that_lie_apart_from_the_new_one_are_joined(general_calls):
    layer, x = grown(), torch.randn(4, 5, 8, requires_grad=True)
    for name in ("gate_weight", "gate_bias"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().clone()))
    has_the_bits_of_the_general_way(layer, x, general_calls)


def _through_data(layer: MingleLinear, name: str) -> None:
    getattr(layer, name).data.mul_(2)


def _in_place(layer: MingleLinear, name: str) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(2)


def _other_memory(layer: MingleLinear, name: str) -> None:
    getattr(layer, name).data = getattr(layer, name).data * 2


def _other_parameter(layer: MingleLinear, name: str) -> None:
    parameter = getattr(layer, name)
    setattr(layer, name, nn.Parameter(parameter.detach() * 2, requires_grad=parameter.requires_grad))


@pytest.mark.parametrize("change", [_in_place, _through_data, _other_memory, _other_parameter])
@pytest.mark.parametrize("name", [name for name, _ in grown().named_parameters()])
def test_changed_parameters_are_seen(change, name):
    layer, x = grown(), torch.randn(4, 5, 8)
    before = layer(x)
    change(layer, name)
    assert torch.equal(layer(x), in_general(layer, x))
    assert not torch.equal(layer(x), before)


def test_parameters_that_lie_otherwise_in_the_same_memory_are_seen():
    layer, x = grown(widths=(8, 8)), torch.randn(4, 5, 8)
    layer(x)
    layer.weight.data = layer.weight.data.t()
    assert torch.equal(layer(x), in_general(layer, x))
    layer.A.data = layer.A.data[:, :2]
    layer.B_transposed.data = layer.B_transposed.data[:, :2]
    assert torch.equal(layer(x), in_general(layer, x))


def test_the_layer_may_change_between_calls():
    layer, x = grown(), torch.randn(4, 5, 8)
    for change in (
        lambda: layer.add_expert(torch.randn(2, 8), torch.randn(6, 2)),
        lambda: layer.set_expert(0, torch.randn(3, 8), torch.randn(6, 3)),
        lambda: layer.set_trainable_gates(2),
        lambda: layer.load_state_dict(grown(5).state_dict()),
        lambda: setattr(layer, "reduce", "batch"),
        lambda: layer.double(),
        lambda: layer.float(),
    ):
        layer(x)
        change()
        x = x.to(layer.weight.dtype)
        assert torch.equal(layer(x), in_general(layer, x))


@pytest.mark.parametrize("how", ["copied", "pickled", "loaded", "converted"])
def test_gates_lie_side_by_side_in_every_layer(how):
    layer = grown(dtype=torch.float64)
    if how == "copied":
        layer = copy.deepcopy(layer)
    elif how == "pickled":
        layer = pickle.loads(pickle.dumps(layer))
    elif how == "loaded":
        other = grown(1, dtype=torch.float64)
        other.load_state_dict(layer.state_dict())
        layer = other
    else:
        layer.float()
    layer(torch.randn(4, 5, 8, dtype=layer.weight.dtype))
    assert layer._prepared is not None
    assert layer._prepared.joined is not None


def test_gates_are_apart_in_everything_but_memory():
    layer = grown()
    version = layer.frozen_gate_weight._version
    with torch.no_grad():
        layer.gate_weight.add_(1)
    assert layer.frozen_gate_weight._version == version
    layer.gate_weight.grad = torch.ones_like(layer.gate_weight)
    assert layer.frozen_gate_weight.grad is None


@pytest.mark.parametrize("name", ["weight", "A", "gate_weight"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_parameters_may_become_attributes(how, called, name):
    layer, x = grown(), torch.randn(4, 5, 8)
    if called:
        layer(x)
    if how == "parametrized":
        twice = type("Twice", (nn.Module,), {"forward": lambda self, tensor: 2 * tensor})
        parametrize.register_parametrization(layer, name, twice())
    else:
        prune.random_unstructured(layer, name, 0.5)
    y = layer(x)
    assert torch.equal(y, in_general(layer, x))
    y.sum().backward()
    assert layer.gate_bias.grad is not None


def test_a_replica_whose_tensors_are_attributes_computes_the_same():
    layer, x = grown(), torch.randn(4, 5, 8)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach())
    torch.testing.assert_close(replica(x), layer(x))


@pytest.mark.parametrize("names", [["gate_weight"], ["gate_bias"], ["frozen_gate_weight"], None])
def test_gates_may_be_more_precise_than_the_layer(names):
    layer, x = grown(), torch.randn(4, 5, 8)
    for name in names or ("gate_weight", "gate_bias", "frozen_gate_weight", "frozen_gate_bias"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.double()
    y = layer(x)
    torch.testing.assert_close(y, functional.gated_experts(x, *layer.tensors(), backend="eager"))
    y.sum().backward()
    assert layer.gate_weight.grad.dtype == layer.gate_weight.dtype


def test_gates_are_not_taken_for_tied_weights(tmp_path):
    layer = grown()
    save_model(layer, tmp_path / "layer.safetensors")
    saved = load_file(tmp_path / "layer.safetensors")
    assert saved.keys() == layer.state_dict().keys()
    storages = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert len(storages) == len(list(layer.parameters()))


def test_layers_are_converted_where_modules_swap_their_tensors():
    layer, x = grown(), torch.randn(4, 5, 8)
    layer(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer(x.double()).dtype == torch.float64


def test_what_is_prepared_is_neither_copied_nor_saved():
    layer = grown()
    plain = len(pickle.dumps(layer))
    layer(torch.randn(4, 5, 8))
    assert layer._prepared is not None
    assert len(pickle.dumps(layer)) == plain
    assert copy.deepcopy(layer)._prepared is None
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)._prepared is None


@pytest.mark.parametrize(
    "case",
    ["no tokens", "masked", "a thawed factor", "autocast", "vmap", "unusual tensors"],
)
def test_other_calls_go_the_general_way(case, general_calls):
    layer, x, mask = grown(), torch.randn(4, 5, 8), None
    if case == "no tokens":
        x = x[:0]
    if case == "masked":
        mask = torch.rand(4, 5) < 0.5
    if case == "a thawed factor":
        layer.A.requires_grad_()
        layer(x).sum().backward()
        assert layer.A.grad.any()
    if case == "unusual tensors":
        x = x.as_subclass(type("Subclass", (Tensor,), {}))
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    elif case == "vmap":
        with torch.no_grad():
            assert torch.func.vmap(layer)(x).shape == (4, 5, 6)
    else:
        layer(x, mask)
    assert general_calls


@pytest.mark.parametrize("backend", ["auto", "grouped"])
@pytest.mark.parametrize("reduce", ["token", "sample", "batch"])
def test_transforms_of_functions_go_through(reduce, backend):
    layer, x = grown(reduce=reduce), torch.randn(4, 5, 8)
    layer.backend = backend
    torch.testing.assert_close(torch.func.vmap(layer)(x[None])[0], layer(x))
    expected = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda value: layer(value).sum())(x), expected)
    tensors = dict(layer.named_parameters())
    found = torch.func.grad(lambda own: torch.func.functional_call(layer, own, (x,)).sum())(tensors)
    layer(x).sum().backward()
    torch.testing.assert_close(found["gate_weight"], layer.gate_weight.grad)
    _, moved = torch.func.jvp(lambda value: layer(value), (x,), (torch.ones_like(x),))
    assert moved.shape == (4, 5, 6)


def test_dispatch_modes_see_the_operator():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = grown(), torch.randn(4, 5, 8)
    layer(x)
    with Watch():
        layer(x)
    assert "mingle.gated_experts.default" in seen


def test_errors_are_those_of_the_general_way():
    layer, x = grown(), torch.randn(4, 5, 8)
    layer(x)
    with pytest.raises(ValueError, match="x has shape"):
        layer(x[..., :7])
    with pytest.raises(TypeError, match="x has dtype torch.float64"):
        layer(x.double())
    layer.reduce = "mean"
    with pytest.raises(ValueError, match="reduce='mean'"):
        layer(x)
    layer.reduce, layer.backend = "sample", "fast"
    with pytest.raises(ValueError, match="backend='fast'"):
        layer(x)
    layer.backend = "auto"
    layer.A = nn.Parameter(torch.randn(3, 2, 7), requires_grad=False)
    with pytest.raises(ValueError, match="A has shape"):
        layer(x)


def test_outputs_may_be_changed_in_place():
    layer, x = grown(), torch.randn(4, 5, 8)
    expected = gradients(layer(x) * 2, layer.gate_weight)
    assert torch.equal(gradients(layer(x).mul_(2), layer.gate_weight)[0], expected[0])


def test_a_step_before_the_backward_changes_no_gradient():
    layer, x = grown(), torch.randn(4, 5, 8, requires_grad=True)
    expected = gradients(layer(x), x)
    y = layer(x)
    with torch.no_grad():
        layer.gate_weight.add_(1)
    assert torch.equal(gradients(y, x)[0], expected[0])


@pytest.mark.parametrize("name", ["weight", "A", "B_transposed"])
def test_a_factor_that_changes_before_the_backward_is_an_error(name):
    layer, x = grown(), torch.randn(4, 5, 8, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        getattr(layer, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_through_the_backward_says_that_it_cannot():
    layer, x = grown(), torch.randn(4, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("reduce", "leading", "most"), [("token", (4, 5), 8), ("sample", (4, 5), 8), ("batch", (4, 5), 9)]
)
def test_a_call_launches_few_operators(reduce, leading, most):
    """Each costs microseconds, whatever it computes."""
    views = {"aten::view", "aten::reshape", "aten::t", "aten::transpose", "aten::as_strided", "aten::detach"}
    layer, x = grown(reduce=reduce), torch.randn(*leading, 8)
    layer(x)
    with torch.profiler.profile() as profile:
        layer(x)
    outer = [
        event.name
        for event in profile.events()
        if event.cpu_parent is None or "aten" not in event.cpu_parent.name
    ]
    launched = [name for name in outer if name.startswith("aten::") and name not in views]
    assert 0 < len(launched) <= most, launched
