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
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mingle.io.files import CheckpointError, contained, read_json
from mingle.io.safetensors import CheckpointReader
from mingle.kernels.dtypes import wide
from mingle.nn.inject import refusal
from mingle.nn.linear import LowRankExpert, MingleLinear
from mingle.options import nearest

logger = logging.getLogger(__name__)

CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 5

V = TypeVar("V", int, float)

#: Options under which base weight + scaling · B A is not what the adapted model computes.
_REFUSED = {
    "use_dora": "normalises the merged weight",
    "use_qalora": "pools the input of the factors",
    "use_bdlora": "stores block-diagonal factors",
    "kasa_config": "truncates the base weights",
    "arrow_config": "routes between adapters",
    "alora_invocation_tokens": "applies the update to some tokens only",
    "lora_bias": "adds a bias to the update",
    "modules_to_save": "replaces whole modules of the base",
    "trainable_token_indices": "replaces rows of the embeddings",
    "target_parameters": "updates parameters outside of linear layers",
    "layer_replication": "repeats layers of the base",
    "megatron_config": "targets Megatron's parallel layers",
}
#: Initialisations that leave the base weights as they are; all others subtract the initial B A from them or
#: quantise them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


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
    folder = Path(folder)
    config = _read_config(folder)
    path = contained(folder, _WEIGHTS)
    if not path.is_file():
        path = contained(folder, _PICKLE)  # whose reader explains how to convert it
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {_WEIGHTS}")
    reader = CheckpointReader(path)
    halves = _pair(reader, path)
    scalings = {module: _check_pair(reader, path, module, *names, config) for module, names in halves.items()}
    return {module: _read_pair(reader, path, *names, scalings[module]) for module, names in halves.items()}


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


@dataclass(frozen=True)
class _Config:
    """What an adapter's configuration says about ranks and scalings."""

    path: Path
    r: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, tuple[re.Pattern[str], int]]
    alpha_pattern: dict[str, tuple[re.Pattern[str], float]]

    def rank(self, module: str) -> int:
        return _resolve(self.rank_pattern, module, self.r, f"{self.path}: rank_pattern")

    def scaling(self, module: str) -> float:
        alpha = _resolve(self.alpha_pattern, module, self.alpha, f"{self.path}: alpha_pattern")
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _resolve(patterns: Mapping[str, tuple[re.Pattern[str], V]], module: str, default: V, where: str) -> V:
    """The value of the first pattern that matches the module's name."""
    matching = {key: value for key, (pattern, value) in patterns.items() if pattern.fullmatch(module)}
    if len(set(matching.values())) > 1:
        # PEFT sorts the patterns when it saves them, so the order that the adapter was trained with is lost.
        logger.warning(
            "%s: layer %r matches %s; the first one counts", where, module, ", ".join(map(repr, matching))
        )
    return next(iter(matching.values()), default)


def _read_config(folder: Path) -> _Config:
    path = contained(folder, CONFIG)
    if not path.is_file():
        inside = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"{folder}: no {CONFIG}" + (f"; there is one in {', '.join(inside[:_SHOWN])}" if inside else "")
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type={config.get('peft_type')!r}: only LORA adapters can be read"
        )
    for option, effect in _REFUSED.items():
        if config.get(option):
            raise CheckpointError(
                f"{path}: {option} is set, which {effect}: "
                "the adapter is more than low-rank updates of linear layers"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path}: bias={config['bias']!r}: biases of the base were trained; only 'none' can be read"
        )
    _check_init(path, config.get("init_lora_weights", True))
    rank_pattern, alpha_pattern = (
        _compile(path, config, option) for option in ("rank_pattern", "alpha_pattern")
    )
    return _Config(
        path,
        _rank(path, "r", config.get("r")),
        _number(path, "lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        {
            key: (pattern, _rank(path, f"rank_pattern: {key}", value))
            for key, (pattern, value) in rank_pattern.items()
        },
        {
            key: (pattern, _number(path, f"alpha_pattern: {key}", value))
            for key, (pattern, value) in alpha_pattern.items()
        },
    )


def _check_init(path: Path, init: Any) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    hint = ""
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        conversion = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        hint = f"; save it with {conversion}, which makes it a plain LoRA adapter"
    raise CheckpointError(
        f"{path}: init_lora_weights={init!r} is not known to leave the base weights as they are{hint}"
    )


def _compile(path: Path, config: Mapping[str, Any], option: str) -> dict[str, tuple[re.Pattern[str], Any]]:
    """The patterns of a `*_pattern` option: regular expressions for whole last components of a name."""
    patterns = config.get(option) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {option}: expected a JSON object")
    compiled = {}
    for key, value in patterns.items():
        try:
            compiled[key] = (re.compile(rf"(.*\.)?({key})"), value)
        except (re.error, RecursionError, OverflowError) as error:
            wrong = f"{key!r} is not a regular expression: {error}"
            raise CheckpointError(f"{path}: {option}: {wrong}") from error
    return compiled


def _rank(path: Path, option: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {option}={value!r}: expected a positive integer")
    return value


def _number(path: Path, option: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{path}: {option}={value!r}: expected a finite number")
    return float(value)


def _pair(reader: CheckpointReader, path: Path) -> dict[str, tuple[str, str]]:
    """The names of lora_A and lora_B of each module; every tensor is one of these."""
    found: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in reader:
        match = _FACTOR.fullmatch(name)
        if match is None:
            expected = "base_model.model.<layer>.lora_A.weight and .lora_B.weight"
            raise CheckpointError(
                f"{path}: tensor {name!r} is not a factor of a linear layer; expected {expected}"
            )
        adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise CheckpointError(f"{path}: tensor {name!r}: more than one adapter in one file")
        found.setdefault(match["module"], {})[match["half"]] = name
    if not found:
        raise CheckpointError(f"{path}: no tensors")
    for module, halves in found.items():
        for half in "AB":
            if half not in halves:
                raise CheckpointError(
                    f"{path}: layer {module!r} has {next(iter(halves.values()))!r} and no lora_{half}"
                )
    return {module: (halves["A"], halves["B"]) for module, halves in found.items()}


def _check_pair(reader: CheckpointReader, path: Path, module: str, a: str, b: str, config: _Config) -> float:
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


def _find_layers(
    model: nn.Module, experts: Mapping[str, LowRankExpert]
) -> dict[str, nn.Linear | MingleLinear]:
    """The layers that the experts name, in model order, once each is known to fit its expert."""
    if not experts:
        raise ValueError("the adapter has no experts")
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear | MingleLinear)]
    found: dict[str, nn.Linear | MingleLinear] = {}
    problems: list[str] = []
    for name, expert in experts.items():
        module = modules.get(name)
        if module is None:
            # Only the problems that are shown get a close name: the search is slow where many are missing.
            hint = nearest(name, linear) if len(problems) < _SHOWN else ""
            problems.append(f"{name!r} is not in the model{hint}")
        elif reason := refusal(module, model.get_submodule(name.rpartition(".")[0])):
            problems.append(f"{name!r} {reason}")
        elif problem := _misfit(module, expert):
            problems.append(f"{name!r}: {problem}")
        else:
            assert isinstance(module, nn.Linear | MingleLinear)  # or it would have been refused
            found[name] = module
    if problems:
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        count = f"{len(problems)} of {len(experts)} layers"
        raise ValueError(
            f"the adapter does not fit the model in {count}: {'; '.join(problems[:_SHOWN])}{rest}"
        )
    return {name: found[name] for name in modules if name in found}


def _misfit(module: nn.Linear | MingleLinear, expert: LowRankExpert) -> str:
    """Why the layer cannot take the expert; empty where it can."""
    rank = len(expert.A) if expert.A.dim() else 0
    if expert.A.shape != (rank, module.in_features) or expert.B.shape != (module.out_features, rank):
        expected = f"[r, {module.in_features}] and [{module.out_features}, r]"
        return f"A has shape {list(expert.A.shape)} and B {list(expert.B.shape)}, expected {expected}"
    for half, tensor in expert._asdict().items():
        if not tensor.to(module.weight.dtype).isfinite().all():
            return f"{half} is not finite in the layer's {module.weight.dtype}"
    return ""
