"""Experts from PEFT LoRA adapters: the saved factors as they are, without a decomposition.

    experts = mingle.read_adapter("adapters/svhn")      # {"layers.0.q_proj": LowRankExpert(A, B), ...}
    layers = mingle.add_adapter(model, experts)

The model then computes what PEFT's merged model does, and its gates can train.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mingle.io.adapter_config import OR_WHOLE, WEIGHTS, AdapterConfig
from mingle.io.checkpoint_files import refuse_two_models
from mingle.io.files import CheckpointError, contained
from mingle.io.safetensors import CheckpointReader
from mingle.kernels.dtypes import wide
from mingle.nn.inject import refusal
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.matrices import AnyLinear, is_linear, widths
from mingle.options import nearest, shown

logger = logging.getLogger(__name__)

_PICKLE = "adapter_model.bin"
ROOT = "base_model.model."
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_HALVES = ("A", "B")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN, _MAX_NAME = 5, 1000


class Adapter(NamedTuple):
    """What an adapter's folder holds.

    Attributes:
        experts: A [r, d_in] and B [d_out, r] by the name of their layer in the model.
        head: the head's tensors as they were saved, by their names in the model; empty where it was not.
    """

    experts: dict[str, LowRankExpert]
    head: dict[str, Tensor]


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
    return read_with_head(folder, ()).experts


def read_with_head(folder: str | os.PathLike[str], head: Collection[str]) -> Adapter:
    """The experts of an adapter, and the head that PEFT saved with it (`modules_to_save`).

    Args:
        folder: see `read_adapter`.
        head: the names of the head's tensors in the model; no other tensors are taken.

    Raises:
        CheckpointError: see `read_adapter`.
    """
    folder = Path(folder)
    refuse_two_models(folder)
    config = AdapterConfig.read(folder, with_head=bool(head))
    path = contained(folder, WEIGHTS)
    if not path.is_file():
        path = contained(folder, _PICKLE)  # whose reader explains how to convert it
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {WEIGHTS}")
    reader = CheckpointReader(path)
    saved = {name: own for name in head if (own := f"{ROOT}{name}") in reader}
    halves = _pair([name for name in reader if name not in saved.values()], path)
    scalings = {module: _check_pair(reader, path, module, *names, config) for module, names in halves.items()}
    return Adapter(
        {module: _read_pair(reader, path, *names, scalings[module]) for module, names in halves.items()},
        {name: reader.tensor(own) for name, own in saved.items()},
    )


def factor_names(layer: str) -> tuple[str, str]:
    """PEFT's names of A and B of a layer, in the file of an adapter."""
    first, second = (f"{ROOT}{layer}.lora_{half}.weight" for half in _HALVES)
    return first, second


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


def _pair(tensors: Iterable[str], path: Path) -> dict[str, tuple[str, str]]:
    """The names of lora_A and lora_B of each module; every tensor is one of these."""
    found: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None or len(name) > _MAX_NAME:
            expected = " and ".join(factor_names("<layer>"))
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is not a factor of a linear layer; expected {expected}; "
                f"{OR_WHOLE}"
            )
        adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise CheckpointError(f"{path}: tensor {name!r}: more than one adapter in one file")
        found.setdefault(match["module"], {})[match["half"]] = name
    if not found:
        raise CheckpointError(f"{path}: no tensors")
    for module, halves in found.items():
        for half in _HALVES:
            if half not in halves:
                raise CheckpointError(
                    f"{path}: layer {module!r} has {next(iter(halves.values()))!r} and no lora_{half}"
                )
    return {module: (halves["A"], halves["B"]) for module, halves in found.items()}


def _check_pair(
    reader: CheckpointReader, path: Path, module: str, a: str, b: str, config: AdapterConfig
) -> float:
    """The scaling of a layer whose factors, by their headers, are as configured."""
    for name in (a, b):
        if reader.dtype(name) not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is of {reader.dtype(name)}; expected {', '.join(map(str, _DTYPES))}"
            )
    rank, A, B = config.rank(module), reader.shape(a), reader.shape(b)
    if len(A) != 2 or len(B) != 2 or A[0] != rank or B[1] != rank:
        raise CheckpointError(
            f"{path}: tensors {a!r} {list(A)} and {b!r} {list(B)}: "
            f"expected [{rank}, d_in] and [d_out, {rank}] by the rank in {config.path}"
        )
    return config.scaling(module)


def _read_pair(reader: CheckpointReader, path: Path, a: str, b: str, scaling: float) -> LowRankExpert:
    A, B = (factor.to(wide(factor)) for factor in map(reader.tensor, (a, b)))
    B = B * scaling
    if not B.isfinite().all():
        raise CheckpointError(f"{path}: tensor {b!r} times its scaling {scaling:g} is not finite")
    return LowRankExpert(A=A, B=B)


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
