"""Other packages: PEFT's X-LoRA layer, and the bare matrix products of the BLAS libraries inside PyTorch."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from mingle.bench.floor import products
from mingle.bench.inputs import Inputs
from mingle.bench.peers.handmade import side_by_side
from mingle.bench.peers.peer import Peer, Step, Unavailable, step


def build_xlora(inputs: Inputs) -> Step:
    """PEFT's own layer classes around one linear layer with T adapters, scaled by our gates instead of its
    classifier.
    """
    try:
        from peft import LoraConfig, XLoraConfig, get_peft_model
        from peft.tuners.xlora.layer import XLoraLinearLayer
    except ImportError as error:
        raise Unavailable("the package peft is not installed") from error
    case, names = inputs.case, [f"expert{i}" for i in range(inputs.case.experts)]
    linear = nn.Linear(case.d_in, case.d_out, device="meta")
    linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (inputs.weight, inputs.bias))
    config = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["layer"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(OrderedDict(layer=linear)), config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        lora = model.base_model.model.layer
        lora.set_adapter(names)
        xlora = XLoraConfig(
            hidden_size=case.d_in, adapters=dict.fromkeys(names, ""), global_scaling_weight=1.0
        )
    for name, A, B in zip(names, inputs.A, inputs.B, strict=True):
        lora.lora_A[name].weight, lora.lora_B[name].weight = (
            nn.Parameter(t, requires_grad=False) for t in (A, B.contiguous())
        )
    layer = XLoraLinearLayer(SimpleNamespace(disabled=False), lora, lora.forward, 0, xlora)

    def forward() -> torch.Tensor:
        scalings = inputs.gate_values().expand(case.samples, case.tokens, case.experts)
        return layer.forward(inputs.x, scalings=scalings.unsqueeze(2))  # [samples, tokens, layers, T]

    return step(inputs, forward)


def build_products(inputs: Inputs) -> Step:
    """The low-rank path's products and nothing else, each in the library that is fastest at it here."""
    case = inputs.case
    if case.routed:
        raise Unavailable("the products depend on the routing")
    down, up = side_by_side(inputs)
    x, dy = inputs.x.detach().flatten(0, 1), inputs.dy.flatten(0, 1)
    hidden = x @ down.mT
    pairs = [(x, down), (x, inputs.weight), (hidden, up.mT)]
    if case.backward:
        pairs += [(dy, up), (dy, inputs.weight.mT), (hidden, down.mT)]
    with torch.no_grad():
        chosen = [min(products(left, right), key=_seconds) for left, right in pairs]

    def run() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {str(i): product() for i, product in enumerate(chosen)}

    return run


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    if run().is_cuda:
        return 0.0  # one library only
    found = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


PEERS = (
    Peer("peft x-lora", build_xlora, "PEFT's X-LoRA layer, driven by our gates"),
    Peer(
        "gemms alone (best library)",
        build_products,
        "the low-rank path's products and nothing else",
        same=lambda case: False,
    ),
)
