"""Eager calls of a frozen layer, past everything that an earlier call has settled.

What `mingle.functional.gated_experts` does for any tensors takes several times as long as the products of a
small layer: it looks whether they fit together, joins old gates with new ones, views factors as matrices and
decides how to compute.  While a layer's own tensors are the same, none of this needs to be done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mingle import ops
from mingle.kernels import gemm
from mingle.kernels.gated_experts import grouped
from mingle.ops import dispatch
from mingle.ops.checks import plain
from mingle.ops.common import gate_bias_gradient, gate_weight_gradient
from mingle.ops.operands import LayerTensors
from mingle.ops.side_by_side import together

# found once, as even looking them up shows
_PLAIN = Tensor, nn.Parameter
_linear, _mm, _addmm, _mul = F.linear, torch.mm, torch.addmm, torch.mul
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_casts, _grad_enabled = torch.is_autocast_enabled, torch.is_grad_enabled

#: backends that are computed here
PREPARED = "auto", "grouped", "triton"
_EXACT = torch.float32, torch.float64
_DEVICES = "cpu", "cuda"
_NAMES = (
    "weight",
    "bias",
    "A",
    "B_transposed",
    "frozen_gate_weight",
    "frozen_gate_bias",
    "gate_weight",
    "gate_bias",
)


class _Gates(NamedTuple):
    """All gates of a layer, oldest first."""

    weight: Tensor  # [T, d_in]
    weight_transposed: Tensor
    bias: Tensor  # [T]
    borrowed: bool  # whether this is the memory of several parameters


class PreparedLayer:
    """The parameters of a `MingleLinear`, and views of them as its products take them.

    Nothing is copied: what the parameters hold may change in place at any time.  `prepare` makes these.
    """

    def __init__(self, asked: str, backend: str, *parameters: Any) -> None:
        """`parameters` in the order of `_NAMES`, such as fit together; `backend` for the operators, by what
        the layer `asked` for."""
        self.parameters, self.asked, self.backend = parameters, asked, backend
        (
            self.weight, self.bias, self.A, self.up,
            self.frozen_weight, self.frozen_bias, self.gate_weight, self.gate_bias,
        ) = parameters  # fmt: skip
        self.dtype, self.device = self.weight.dtype, self.weight.device
        self.kind = self.device.type
        of_gates = {gate.dtype for gate in parameters[4:]}
        exact = self.dtype in _EXACT and of_gates == {self.dtype}
        self.by_products = self.kind == "cpu" and backend == "grouped" and exact
        self.places = self._places()
        self.frozen = len(self.frozen_weight)
        self.experts, self.rank, self.width = self.A.shape
        self.outputs, self.columns = len(self.weight), self.experts * self.rank
        # multiplications of one token in the largest of the products
        self.largest = max(self.width * self.outputs, self.width * self.columns, self.columns * self.outputs)
        self.weight_transposed = self.weight.detach().t()
        self.down = self.A.detach().flatten(0, 1)  # [T·r, d_in]
        self.down_transposed = self.down.t()
        self.up_rows = self.up.detach().flatten(0, 1)  # [T·r, d_out]
        self.joined = self._joined()

    def _places(self) -> tuple[Any, ...]:
        """Where parameters of which there are views lie in memory, and how."""
        weight, A, up = self.weight, self.A, self.up
        return (
            weight.data_ptr(), weight.shape, weight.stride(),
            A.data_ptr(), A.shape, A.stride(),
            up.data_ptr(), up.shape, up.stride(),
            self.frozen_weight.data_ptr(), self.frozen_bias.data_ptr(),
            self.gate_weight.data_ptr(), self.gate_bias.data_ptr(),
        )  # fmt: skip

    def holds(self, own: Mapping[str, Tensor | None], backend: str) -> bool:
        """Whether `own` are these parameters, and lie where they lay, and this is what was asked for."""
        return (
            backend == self.asked
            and own.get("weight") is self.weight
            and own.get("bias") is self.bias
            and own.get("A") is self.A
            and own.get("B_transposed") is self.up
            and own.get("frozen_gate_weight") is self.frozen_weight
            and own.get("frozen_gate_bias") is self.frozen_bias
            and own.get("gate_weight") is self.gate_weight
            and own.get("gate_bias") is self.gate_bias
            and self._places() == self.places
        )

    def _joined(self) -> _Gates | None:
        """The gates without a copy; None where old and new ones do not lie side by side."""
        if self.frozen == 0:
            weight = self.gate_weight.detach()
            return _Gates(weight, weight.t(), self.gate_bias.detach(), borrowed=False)
        weight = together((self.frozen_weight, self.gate_weight))
        bias = together((self.frozen_bias, self.gate_bias))
        return None if weight is None or bias is None else _Gates(weight, weight.t(), bias, borrowed=True)

    def gates(self) -> _Gates:
        if self.joined is not None:
            return self.joined
        weight = torch.cat((self.frozen_weight, self.gate_weight))
        return _Gates(weight, weight.t(), torch.cat((self.frozen_bias, self.gate_bias)), borrowed=False)

    def forward(self, x: Tensor, reduce: str) -> Tensor | None:
        """What the layer makes of x [..., N, d_in]; None where it is to be computed in the general way."""
        shape = x.shape
        dims = len(shape)
        if (
            type(x) not in _PLAIN
            or x.device != self.device
            or x.dtype is not self.dtype
            or not dims
            or shape[-1] != self.width
            or _modes()
            or _transforms()
            or _casts(self.kind)
        ):
            return None
        rows = x if dims == 2 else x.reshape(-1, self.width)
        tokens = rows.shape[0]
        if reduce == "sample":
            group = shape[-2] if dims > 2 else 1
        elif reduce == "batch":
            group = tokens
        elif reduce == "token":
            group = 1
        else:
            return None
        if tokens == 0:
            return None
        fold = group == tokens and dispatch.folding_pays(
            tokens, self.width, self.outputs, self.columns, self.kind
        )
        if fold and tokens == 1:
            return None
        if _grad_enabled():
            if self._thaws():
                return None
            if rows.requires_grad or self.gate_weight.requires_grad or self.gate_bias.requires_grad:
                y = _Differentiable.apply(rows, self.gate_weight, self.gate_bias, (self, group, fold))
                return y if dims == 2 else self._shaped(y, shape)
        y = self.compute(self.gates(), rows, group, fold, False)[0]
        return y if dims == 2 else self._shaped(y, shape)

    def compute(self, gates: _Gates, x: Tensor, group: int, fold: bool, keep: bool) -> _Results:
        """y for x [N, d_in], `group` tokens to a gate row, and what a backward needs, for which `keep` is."""
        if self.by_products:
            return (folded if fold else low_rank)(self, gates, x, group, keep)
        weight, _, bias, _ = gates
        layer = self.weight, self.bias, self.A, self.up.mT, weight, bias, None, None
        if fold:
            y, product, z, pooled = ops.FOLDED.plain(x, *layer, self.frozen, self.backend)
        else:
            options = group, self.frozen, False, keep, self.backend
            y, product, z, pooled = ops.LOW_RANK.plain(x, *layer, *options)
        return y, product, z, pooled if pooled.shape[0] else None

    def _shaped(self, y: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) == 3:
            return y.view(shape[0], shape[1], self.outputs)
        return y.view(*shape[:-1], self.outputs)

    def _thaws(self) -> bool:
        """Whether anything but the newest gates needs a gradient."""
        bias = self.bias
        return (
            self.weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or self.A.requires_grad
            or self.up.requires_grad
            or self.frozen_weight.requires_grad
            or self.frozen_bias.requires_grad
        )


#: y [N, d_out]; H [N, T·r] or W_eff [d_out, d_in]; z [G, T]; x̄ [G, d_in], or None for gates of single tokens
_Results = tuple[Tensor, Tensor, Tensor, Tensor | None]


def low_rank(layer: PreparedLayer, gates: _Gates, x: Tensor, group: int, keep: bool) -> _Results:
    """`mingle.ops.gated_experts` of x [N, d_in]; without `keep`, for a backward, H is overwritten."""
    weight, weight_transposed, bias, _ = gates
    if group == 1:
        z, pooled = _linear(x, weight) + bias, None
    else:
        pooled = x.view(-1, group, layer.width).mean(1)
        z = _addmm(bias, pooled, weight_transposed)
    if gemm.choosing(x.shape[0] * layer.largest):
        hidden = gemm.linear(x, layer.down)
        gated = grouped.gate(hidden, z, group, None if keep else hidden)
        base = gemm.linear(x, layer.weight, layer.bias)
        return gemm.linear(gated, layer.up_rows.t(), onto=base), hidden, z, pooled
    hidden = _mm(x, layer.down_transposed)
    parts, factors = hidden.view(-1, group, layer.experts, layer.rank), z.view(-1, 1, layer.experts, 1)
    gated = (_mul(parts, factors) if keep else parts.mul_(factors)).view(-1, layer.columns)
    if layer.bias is None:
        y = _mm(x, layer.weight_transposed)
    else:
        y = _addmm(layer.bias, x, layer.weight_transposed)
    return y.addmm_(gated, layer.up_rows), hidden, z, pooled


def folded(layer: PreparedLayer, gates: _Gates, x: Tensor, group: int, keep: bool) -> _Results:
    """`mingle.ops.gated_experts_folded` of x [N, d_in], N > 1."""
    pooled = x.view(-1, group, layer.width).mean(1)
    z = _addmm(gates.bias, pooled, gates.weight_transposed)
    if gemm.choosing(max(x.shape[0], layer.columns) * layer.largest):
        weight = grouped.fold(layer.weight, layer.A, layer.up.mT, z[0])
        return gemm.linear(x, weight, layer.bias), weight, z, pooled
    gated = _mul(layer.up, z.view(-1, 1, 1)).view(layer.columns, layer.outputs).t()  # [d_out, T·r]
    weight = _mm(gated, layer.down).add_(layer.weight)
    return _linear(x, weight, layer.bias), weight, z, pooled


class _Differentiable(torch.autograd.Function):
    """`low_rank` or `folded` with a backward, for x and the newest gates alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_weight: Tensor, gate_bias: Tensor, call: tuple[PreparedLayer, int, bool]
    ) -> Tensor:
        layer, group, fold = call  # in one, as PyTorch looks at each argument
        gates = layer.gates()
        y, product, z, pooled = layer.compute(gates, x, group, fold, True)
        through_gates = None
        if ctx.needs_input_grad[0]:  # an optimizer may change the gates before the backward
            through_gates = gates.weight.clone() if gates.borrowed else gates.weight
        ctx.save_for_backward(
            layer.weight,
            layer.A,
            layer.up,
            through_gates,
            product,
            z,
            x if fold else None,
            x if pooled is None else pooled,
        )
        ctx.set_materialize_grads(False)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (dy,), (layer, group, fold) = grads, ctx.call
        if dy is None:
            return (None,) * 4
        frozen = layer.frozen
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight, A, up, gates, product, z, x, seen = ctx.saved_tensors
        first = 0 if need_x else frozen
        if fold:
            dx, dz = ops.FOLDED.backward(dy, x, product, A, up.mT, gates, None, first, need_x)
        else:
            factors = weight, A, up.mT, gates, None, product, z
            options = group, first, need_x, False, False, layer.backend
            dx, dz, _ = ops.LOW_RANK.backward(dy, *factors, *options)
        dz = dz[:, frozen - first :]
        return (
            dx if need_x else None,
            gate_weight_gradient(dz, 0, seen, layer.gate_weight.dtype) if need_weight else None,
            gate_bias_gradient(dz, 0, layer.gate_bias.dtype) if need_bias else None,
            None,
        )


def prepare(own: Mapping[str, Tensor | None], backend: str) -> PreparedLayer | None:
    """The parameters of a `MingleLinear` by name, prepared; None where no call of it may come here.

    Raises:
        What `mingle.functional.gated_experts` raises where they do not fit together.
    """
    parameters = [own.get(name) for name in _NAMES]
    weight, bias, A, up, *of_gates = parameters
    if not own.keys() >= set(_NAMES) or weight is None or A is None or up is None or len(A) == 0:
        return None  # parametrized, pruned, or without experts
    device = weight.device
    if device.type not in _DEVICES or not (A.is_contiguous() and up.is_contiguous()):
        return None
    if not all(tensor is None or _ordinary(tensor, device) for tensor in parameters):
        return None
    frozen_weight, frozen_bias, gate_weight, gate_bias = (gate for gate in of_gates if gate is not None)
    with torch.inference_mode(False), torch.no_grad():
        gates = torch.cat((frozen_weight, gate_weight)), torch.cat((frozen_bias, gate_bias))
        if not plain(weight, LayerTensors(weight, bias, A, up.mT, *gates), len(frozen_weight)):
            return None
        plan = dispatch.plan(backend, weight, 1, len(weight), A.shape[0] * A.shape[1])
        return PreparedLayer(backend, plan.backend, *parameters)


def _ordinary(tensor: Tensor, device: torch.device) -> bool:
    return (
        type(tensor) is nn.Parameter
        and tensor.device == device
        and tensor.layout is torch.strided
        and not tensor.is_inference()
    )
