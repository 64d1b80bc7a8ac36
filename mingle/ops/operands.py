"""What operators take, by name: a layer's tensors, a call's facts, and each operator's flat arguments."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Operand = TypeVar("Operand", Tensor, Tensor | None)


def dense(tensor: Operand) -> Operand:
    """The same values in row-major order without gaps, for kernels that get an address and no strides.

    An operator passes them through here before it calls a kernel.  What lies so already is not copied.
    """
    return None if tensor is None else tensor.contiguous()


class LayerTensors(NamedTuple):
    """The tensors of a layer: its base, T experts of rank r and their linear gates.

    The gates are None where a router gives the gate values.
    """

    weight: Tensor  # W₀ [d_out, d_in]
    bias: Tensor | None  # [d_out]
    A: Tensor  # [T, r, d_in]
    B: Tensor  # [T, d_out, r]
    gate_weight: Tensor | None  # [T, d_in]
    gate_bias: Tensor | None  # [T]


class Call(NamedTuple):
    """The facts of a call beside its x [N, d_in] and the layer, in the order of `mingle::gated_experts`."""

    gates: Tensor | None  # [N / group, T], fp32 (fp64 for fp64): given gate values
    mask: Tensor | None  # bool [N]: tokens that count in their group's mean
    group: int  # consecutive tokens that share a gate row
    frozen_gates: int  # how many of the first gates need no gradient
    skip: bool  # pass over gates that are 0; only where neither gates nor experts need gradients
    save: bool  # a backward may follow
    backend: str  # "grouped" or "triton"


class LowRankOperands(NamedTuple):
    """One value per argument of `mingle::gated_experts`.

    These are the arguments themselves, or whether each needs a gradient, or its gradient.
    """

    x: Any = None
    weight: Any = None
    bias: Any = None
    A: Any = None
    B: Any = None
    gate_weight: Any = None
    gate_bias: Any = None
    gates: Any = None
    mask: Any = None
    group: Any = None
    frozen_gates: Any = None
    skip: Any = None
    save: Any = None
    backend: Any = None


class FoldedOperands(NamedTuple):
    """The same for `mingle::gated_experts_folded`."""

    x: Any = None
    weight: Any = None
    bias: Any = None
    A: Any = None
    B: Any = None
    gate_weight: Any = None
    gate_bias: Any = None
    gates: Any = None
    mask: Any = None
    frozen_gates: Any = None
    backend: Any = None


class SharedOperands(NamedTuple):
    """The same for `mingle::gated_experts_shared`; plural arguments are lists with one entry per layer."""

    x: Any = None
    weights: Any = None
    biases: Any = None
    As: Any = None
    Bs: Any = None
    gate_weights: Any = None
    gate_biases: Any = None
    mask: Any = None
    group: Any = None
    frozen_gates: Any = None
    save: Any = None
    backend: Any = None
