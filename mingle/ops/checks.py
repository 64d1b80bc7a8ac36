"""Whether the arguments of public functions fit together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mingle.kernels.gated_experts.reference import REDUCTIONS
from mingle.ops.dispatch import BACKENDS
from mingle.ops.operands import LayerTensors


def check_together(tensors: Mapping[str, Tensor]) -> None:
    """Raise a TypeError unless all are floating-point and on the first one's device; it names who is not."""
    first = next(iter(tensors), "")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
        if tensor.device != tensors[first].device:
            raise TypeError(f"{name} is on {tensor.device}, {first} on {tensors[first].device}")


def check(
    x: Tensor,
    layer: LayerTensors,
    reduce: str,
    mask: Tensor | None,
    gates: Tensor | None,
    frozen_gates: int,
    backend: str,
) -> None:
    """Raise an error of `mingle.functional.gated_experts` that names the first argument that does not fit."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}: expected one of {', '.join(REDUCTIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if frozen_gates >= 0 and gates is None and mask is None and plain(x, layer, frozen_gates):
        return
    weight, A, B = layer.weight, layer.A, layer.B
    if weight.dim() != 2 or A.dim() != 3 or B.dim() != 3 or x.dim() < 1:
        raise ValueError(
            "expected x [..., d_in], weight [d_out, d_in], A [T, r, d_in] and B [T, d_out, r], "
            f"got x {list(x.shape)}, weight {list(weight.shape)}, A {list(A.shape)}, B {list(B.shape)}"
        )
    if not 0 <= frozen_gates <= A.shape[0]:
        raise ValueError(f"frozen_gates={frozen_gates}: there are {A.shape[0]} experts")
    if gates is not None:
        _check_given_gates(gates, x, A.shape[0])
    elif A.shape[0] and (layer.gate_weight is None or layer.gate_bias is None):
        raise ValueError("gate_weight and gate_bias are needed unless gates is given")
    _check_shapes(x, layer, mask, gates)
    _check_dtypes(x, layer, mask, gates)


def plain(x: Tensor, layer: LayerTensors, frozen_gates: int) -> bool:
    """Whether nothing is wrong with a call without mask and given gates, found in a few comparisons.

    Layers are called so often that what would be wrong is looked for only where this says no.
    """
    weight, bias, A, B, gate_weight, gate_bias = layer
    if weight.dim() != 2 or A.dim() != 3 or x.dim() < 1 or gate_weight is None or gate_bias is None:
        return False
    (d_out, d_in), (experts, rank, width) = weight.shape, A.shape
    dtype, device = weight.dtype, weight.device
    return (
        frozen_gates <= experts
        and x.shape[-1] == d_in == width
        and B.shape == (experts, d_out, rank)
        and gate_weight.shape == (experts, d_in)
        and gate_bias.shape == (experts,)
        and x.dtype == A.dtype == B.dtype == dtype
        and dtype.is_floating_point
        and gate_weight.dtype.is_floating_point
        and gate_bias.dtype.is_floating_point
        and x.device == A.device == B.device == gate_weight.device == gate_bias.device == device
        and (bias is None or (bias.shape == (d_out,) and bias.dtype == dtype and bias.device == device))
    )


def _check_given_gates(gates: Tensor, x: Tensor, experts: int) -> None:
    tokens, samples, own = x.shape[:-1], x.shape[:-2], gates.shape[:-1]
    spans = len(own) == len(tokens) and all(size in (1, n) for size, n in zip(own, tokens, strict=True))
    if gates.shape[-1] != experts or not (own in ((), samples) or spans):
        raise ValueError(
            f"gates has shape {list(gates.shape)}; for x {list(x.shape)} and {experts} experts expected "
            f"[{experts}], {[*samples, experts]} or {[*tokens, experts]}, "
            "there with 1 for any dimension that is shared"
        )


def _check_shapes(x: Tensor, layer: LayerTensors, mask: Tensor | None, gates: Tensor | None) -> None:
    leading, device = x.shape[:-1], x.device
    (d_out, d_in), (experts, rank, _) = layer.weight.shape, layer.A.shape
    for name, tensor, shape in (
        ("x", x, (*leading, d_in)),
        ("weight", layer.weight, (d_out, d_in)),
        ("bias", layer.bias, (d_out,)),
        ("A", layer.A, (experts, rank, d_in)),
        ("B", layer.B, (experts, d_out, rank)),
        ("gate_weight", layer.gate_weight, (experts, d_in)),
        ("gate_bias", layer.gate_bias, (experts,)),
        ("mask", mask, leading),
        ("gates", gates, None),
    ):
        if tensor is None:
            continue
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != device:
            raise TypeError(f"{name} is on {tensor.device}, x on {device}")


def _check_dtypes(x: Tensor, layer: LayerTensors, mask: Tensor | None, gates: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, expected torch.bool")
    if gates is not None and gates.is_complex():
        raise TypeError(f"gates has dtype {gates.dtype}, expected a real one")
    for name, tensor in (
        ("weight", layer.weight),
        ("gate_weight", layer.gate_weight),
        ("gate_bias", layer.gate_bias),
    ):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
    dtype = layer.weight.dtype
    for name, tensor in (("x", x), ("A", layer.A), ("B", layer.B), ("bias", layer.bias)):
        if tensor is None or tensor.dtype == dtype:
            continue
        if torch.is_autocast_enabled(x.device.type):
            return
        raise TypeError(f"{name} has dtype {tensor.dtype}, weight {dtype}: cast one of them, or use autocast")
