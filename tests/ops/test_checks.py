"""What fits is seen at once, and whatever the quick look lets through the thorough one would too."""

from __future__ import annotations

import pytest
import torch
from small_problems import problem

from mingle.ops import checks
from mingle.ops.operands import LayerTensors

NAMES = LayerTensors._fields
D, F, WHOLE = torch.float64, torch.float32, torch.int64
#: of a layer of eight inputs and outputs with three experts of rank 2, in float64
WRONG = {
    "weight": [torch.zeros(8, dtype=D), torch.zeros(8, 9, dtype=D), torch.zeros(8, 8, dtype=WHOLE)],
    "bias": [torch.zeros(1, dtype=D), torch.zeros(8, dtype=F)],
    "A": [torch.zeros(6, 8, dtype=D), torch.zeros(3, 2, 9, dtype=D), torch.zeros(3, 2, 8, dtype=F)],
    "B": [torch.zeros(3, 8, dtype=D), torch.zeros(3, 2, 8, dtype=D), torch.zeros(3, 8, 2, dtype=F)],
    "gate_weight": [torch.zeros(1, 8), torch.zeros(3, 8, dtype=WHOLE), None],
    "gate_bias": [torch.zeros(1), torch.zeros(3, dtype=WHOLE), None],
    "x": [torch.zeros(2, 9, 7, dtype=D), torch.zeros((), dtype=D), torch.zeros(2, 9, 8, dtype=F)],
}


def call(changed: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, LayerTensors]:
    tensors = {name: tensor for name, tensor in problem(2, 9).items() if name in (*NAMES, "x")}
    x, *layer = (changed.get(name, tensors[name]) for name in ("x", *NAMES))
    return x, LayerTensors(*layer)


def test_a_plain_call_needs_no_thorough_look(monkeypatch):
    monkeypatch.setattr(checks, "_check_shapes", None)  # would raise if called
    checks.check(*call({}), "sample", None, None, 0, "auto")


@pytest.mark.parametrize(
    "changed",
    [{name: tensor} for name, tensors in WRONG.items() for tensor in tensors],
    ids=lambda changed: "-".join(
        f"{name} {None if tensor is None else f'{tensor.dtype} {list(tensor.shape)}'}"
        for name, tensor in changed.items()
    ),
)
def test_what_is_wrong_is_never_taken_for_plain(changed):
    with pytest.raises((ValueError, TypeError)):
        checks.check(*call(changed), "sample", None, None, 0, "auto")


@pytest.mark.parametrize("frozen", [-1, 99])
def test_more_frozen_gates_than_experts_are_refused(frozen):
    with pytest.raises(ValueError, match="frozen_gates"):
        checks.check(*call({}), "sample", None, None, frozen, "auto")


def test_whole_numbers_throughout_are_refused():
    x, layer = call({})
    whole = LayerTensors(*(tensor.long() for tensor in layer[:4]), *layer[4:])
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int64"):
        checks.check(x.long(), whole, "sample", None, None, 0, "auto")
