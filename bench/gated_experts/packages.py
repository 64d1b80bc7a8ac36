"""Layers and kernels of other packages, driven by the gates of a case."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mingle.bench.gated_experts.inputs import Inputs, Pass, differentiated
from mingle.bench.measure import Unavailable, need


def xlora(t: Inputs) -> Pass:
    """PEFT's layer classes around one linear layer with T adapters, scaled by our gates."""
    try:
        from peft import LoraConfig, XLoraConfig, get_peft_model
        from peft.tuners.xlora.layer import XLoraLinearLayer
    except ImportError as error:
        raise Unavailable("the package peft is not installed") from error
    case, names = t.case, [f"expert{i}" for i in range(t.case.experts)]
    frozen = partial(nn.Parameter, requires_grad=False)
    linear = nn.Linear(case.d_in, case.d_out, device="meta")
    linear.weight, linear.bias = frozen(t.weight), frozen(t.bias)
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["layer"], init_lora_weights=False)
    base: Any = nn.Sequential(OrderedDict(layer=linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(base, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        lora = model.base_model.model.layer
        lora.set_adapter(names)
        adapters = dict.fromkeys(names, "")
        xlora = XLoraConfig(hidden_size=case.d_in, adapters=adapters, global_scaling_weight=1.0)
    for name, A, B in zip(names, t.A, t.B, strict=True):
        lora.lora_A[name].weight, lora.lora_B[name].weight = frozen(A), frozen(B.contiguous())
    owner: Any = SimpleNamespace(disabled=False)
    layer: Any = XLoraLinearLayer(owner, lora, lora.forward, 0, xlora)

    def forward() -> Tensor:
        scalings = t.gate_values().expand(case.samples, case.tokens, case.experts)
        y: Tensor = layer.forward(t.x, scalings=scalings.unsqueeze(2))  # [samples, tokens, layers, T]
        return y

    return differentiated(t, forward)


def vllm(t: Inputs) -> Pass:
    """`lora_shrink` and `lora_expand` over a layer's output, each token with the one adapter that is open."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError as error:
        raise Unavailable("the package vllm is not installed") from error
    case, device = t.case, t.x.device
    need(t.gates is not None and not case.backward, "vLLM gives a token one adapter, and no gradient")
    need(t.x.dtype.itemsize == 2, "vLLM's adapters are in half precision")
    assert t.gates is not None
    x, down, up = t.x.flatten(0, 1), t.A.contiguous(), t.B.contiguous()
    meta = LoRAKernelMeta.make(case.experts, len(x), device)
    meta.prepare_tensors(t.gates.argmax(1).int().repeat_interleave(case.tokens))
    sorted_tokens = meta.meta_args(len(x), False)

    def forward() -> Tensor:
        hidden = torch.empty(1, len(x), case.rank, dtype=torch.float32, device=device)
        lora_shrink(x, [down], hidden, *sorted_tokens, 1.0)
        y = nn.functional.linear(x, t.weight, t.bias)
        lora_expand(hidden, [up], y, *sorted_tokens, offset_start=0, add_inputs=True)
        return y.view(case.samples, case.tokens, case.d_out)

    return differentiated(t, forward)
