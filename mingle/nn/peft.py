"""Experts from PEFT LoRA adapters: the saved factors as they are, without a decomposition.

    experts = mingle.read_adapter("adapters/svhn")      # {"layers.0.q_proj": LowRankExpert(A, B), ...}
    layers = mingle.add_adapter(model, experts)

The model then computes what PEFT's merged model does, and its gates can train.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mingle.nn import adapter_files
from mingle.nn.inject import refusal
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.matrices import AnyLinear, is_linear, widths
from mingle.options import nearest

_SHOWN = 5


def read_adapter(folder: str | os.PathLike[str]) -> dict[str, LowRankExpert]:
    """The experts of a PEFT LoRA adapter, from the folder that `save_pretrained` writes.

    The factors are used as they are: A is `lora_A` and B is `lora_B` times the layer's scaling, alpha / r, or
    alpha / √r for `use_rslora`, with `rank_pattern` and `alpha_pattern` resolved as PEFT does.  float16 and
    bfloat16 are widened to float32, as in PEFT, so that the scaling rounds nothing away.  The options and all
    shapes are checked before a tensor is read.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`; nothing outside it is opened.

    Returns:
        The expert, A [r, d_in] and B [d_out, r] in float32 or float64 on the CPU, by the name of its layer
        inside the base model.

    Raises:
        CheckpointError: a missing, broken or pickle-only file; an adapter that is more than a sum of low-rank
            updates (DoRA, trained biases, embeddings or whole modules, ...) or that fits only a changed base
            (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ); a factor without its other half, of another shape or rank
            than configured, or with non-finite values.  The message names the file and the option or tensor.
    """
    return adapter_files.read(Path(folder), only=()).experts()


def add_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str] | Mapping[str, LowRankExpert],
    *,
    reduce: str = "sample",
    backend: str = "auto",
    gate_bias: float = 1.0,
) -> dict[str, MingleLinear]:
    """Add the experts of a LoRA adapter, in place, to exactly the layers that it names.

    Their gates start out constant, at `gate_bias`: with the default of 1 the model computes what PEFT's
    merged model does.  Further adapters, of any rank, can be added one after another; as with every new
    expert, their gates become the trainable ones and older gates freeze.

    Args:
        model: any module.
        adapter: an adapter's folder, or the experts A [r, d_in] and B [d_out, r] by layer name, as
            `read_adapter` returns them.  Where the model's layers were renamed since the adapter was saved,
            rename the keys.
        reduce: what the gates of newly injected layers see; see `mingle.functional.gated_experts`.  Layers
            that were injected before keep theirs.
        backend: likewise.
        gate_bias: the initial bias of the gates; their weight starts at zero.

    Returns:
        The named layers, in model order.

    Raises:
        CheckpointError: see `read_adapter`.
        ValueError: layers that are not in the model (the message names the closest), are not a Linear, or
            cannot hold their expert; an unknown `reduce`; a `gate_bias` that is not finite.  On any error
            the model is unchanged.
    """
    experts = adapter if isinstance(adapter, Mapping) else read_adapter(adapter)
    if not math.isfinite(gate_bias):
        raise ValueError(f"gate_bias={gate_bias}: expected a finite number")
    targets = _find_layers(model, experts)
    # add_expert replaces parameters and never writes into them, so the old ones undo it.
    before = {name: dict(module._parameters) for name, module in targets.items()}
    layers: dict[str, MingleLinear] = {}
    try:
        for name, module in targets.items():
            layer = (
                module
                if isinstance(module, MingleLinear)
                else MingleLinear.from_linear(module, reduce, backend=backend)
            )
            expert = experts[name]
            layer.add_expert(
                expert.A, expert.B, gate_weight=torch.zeros(layer.in_features), gate_bias=gate_bias
            )
            layers[name] = layer
    except BaseException:
        for name, module in targets.items():
            module._parameters.update(before[name])
        raise
    for name, layer in layers.items():
        if layer is not targets[name]:
            model.set_submodule(name, layer)
    return layers


def _find_layers(model: nn.Module, experts: Mapping[str, LowRankExpert]) -> dict[str, AnyLinear]:
    """The layers that the experts name, in model order, once each is known to fit its expert."""
    if not experts:
        raise ValueError("the adapter has no experts")
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if is_linear(module)]
    found: dict[str, AnyLinear] = {}
    problems: list[str] = []
    for name, expert in experts.items():
        module = modules.get(name)
        if module is None:
            # Only the problems that are shown get a close name: the search is slow where many are missing.
            hint = nearest(name, linear) if len(problems) < _SHOWN else ""
            problems.append(f"{name!r} is not in the model{hint}")
        elif reason := refusal(module, model.get_submodule(name.rpartition(".")[0])):
            problems.append(f"{name!r} {reason}")
        else:
            assert is_linear(module)  # or it would have been refused
            if problem := _misfit(module, expert):
                problems.append(f"{name!r}: {problem}")
            else:
                found[name] = module
    if problems:
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        count = f"{len(problems)} of {len(experts)} layers"
        raise ValueError(
            f"the adapter does not fit the model in {count}: {'; '.join(problems[:_SHOWN])}{rest}"
        )
    return {name: found[name] for name in modules if name in found}


def _misfit(module: AnyLinear, expert: LowRankExpert) -> str:
    """Why the layer cannot take the expert; empty where it can."""
    rank = len(expert.A) if expert.A.dim() else 0
    d_out, d_in = widths(module)
    if expert.A.shape != (rank, d_in) or expert.B.shape != (d_out, rank):
        expected = f"[r, {d_in}] and [{d_out}, r]"
        return f"A has shape {list(expert.A.shape)} and B {list(expert.B.shape)}, expected {expected}"
    for half, tensor in expert._asdict().items():
        if not tensor.to(module.weight.dtype).isfinite().all():
            return f"{half} is not finite in the layer's {module.weight.dtype}"
    return ""
