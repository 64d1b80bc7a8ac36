"""What is compared: this library in all its forms, other packages, and what is written by hand."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mingle import functional
from mingle.bench.gated_experts import handmade
from mingle.bench.gated_experts.floor import fastest, products
from mingle.bench.gated_experts.inputs import Inputs, Outputs, Pass, differentiated
from mingle.bench.gated_experts.peer import KernelPeer, replayed
from mingle.bench.measure import OURS, Unavailable
from mingle.kernels import gemm, prepack
from mingle.ops import dispatch

EXPLICIT = tuple(backend for backend in dispatch.BACKENDS if backend != "auto")


def build(t: Inputs, backend: str = "auto") -> Pass:
    """`mingle.functional.gated_experts` with the backend it chooses itself, or the one named."""
    frozen = 0 if t.case.routed else t.case.experts - 1
    options: dict[str, Any] = dict(reduce=t.case.reduce, gates=t.gates, frozen_gates=frozen, backend=backend)

    def forward() -> Tensor:
        return functional.gated_experts(t.x, t.weight, t.bias, t.A, t.B, *t.all_gates(), **options)

    return differentiated(t, forward)


def _build_explicit(t: Inputs, backend: str) -> Pass:
    run = build(t, backend)
    try:
        run()
    except RuntimeError as error:
        if "cannot run" not in str(error):
            raise
        raise Unavailable(str(error)) from error
    return run


def build_prepacked(t: Inputs) -> Pass:
    """As `MingleLinear(…, prepack=True)` does, check for changed weights at every call included."""
    if t.case.routed or not gemm.packing_pays(t.x.flatten(0, 1), t.case.d_out):
        raise Unavailable("no packed product would be the fastest here")
    up = t.B.mT.clone()  # copies are found by memory: the other peers are to have none
    own = replace(t, weight=t.weight.clone(), A=t.A.clone(), B=up.mT)
    run = build(own)

    def packed() -> Outputs:
        prepack.keep(own.weight, own.A, up)
        return run()

    return packed


def _one_expert(t: Inputs) -> Inputs:
    if not t.case.routed:
        raise Unavailable("only where a router opens one expert per sample")
    return t.one_expert()


def build_xlora(t: Inputs) -> Pass:
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


def build_products(t: Inputs) -> Pass:
    """The low-rank path's products and nothing else, each in the library that is fastest at it here."""
    if t.case.routed:
        raise Unavailable("the products depend on the routing")
    down, up = t.side_by_side()
    x, dy = t.x.detach().flatten(0, 1), t.dy.flatten(0, 1)
    hidden = x @ down.mT
    pairs = [(x, down), (x, t.weight), (hidden, up.mT)]
    pairs += [(dy, up), (dy, t.weight.mT), (hidden, down.mT)] if t.case.backward else []
    with torch.no_grad():
        chosen = [min(products(*pair), key=lambda run: fastest(run, x.device)) for pair in pairs]

    def run() -> Outputs:
        with torch.no_grad():
            return {str(i): product() for i, product in enumerate(chosen)}

    return run


_PACKED = "frozen weights packed for the CPU, which takes their memory again"
_ALONE = "the low-rank path's products and nothing else"
#: by name
PEERS = {
    peer.name: peer
    for peer in (
        KernelPeer(OURS, build, 'backend="auto"'),
        *(KernelPeer(f"mingle {b}", partial(_build_explicit, backend=b), f'backend="{b}"') for b in EXPLICIT),
        KernelPeer("mingle prepacked", build_prepacked, _PACKED),
        KernelPeer("mingle one expert", build, "T = 1: what routed gates should cost", adapt=_one_expert),
        KernelPeer("mingle CUDA graph", replayed(build), "replayed", captured=True),
        *handmade.PEERS,
        KernelPeer("peft x-lora", build_xlora, "PEFT's X-LoRA layer, driven by our gates"),
        KernelPeer("gemms alone (best library)", build_products, _ALONE, same=lambda case: False),
    )
}
#: built in tens of seconds: left out unless the case is `compiled` or they are asked for
SLOW_TO_BUILD = ("grouped compiled",)
#: ways to compute a case among which `backend="auto"` chooses, or could have
STRATEGIES = (OURS, *(f"mingle {backend}" for backend in EXPLICIT), "grouped eager", "fold eager")
