"""Experts as the files of PEFT adapters, and the tensors of a merge from such files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mingle.io.adapter_config import lora_config
from mingle.io.adapters_folder import AdapterFiles, Adapters
from mingle.io.files import CheckpointError
from mingle.io.hub import ModelName
from mingle.methods.base import Tensors
from mingle.nn import adapter_files
from mingle.nn.adapter_files import ROOT, factor_names
from mingle.nn.low_rank_expert import LowRankExpert
from mingle.nn.matrices import transposed
from mingle.tasks import TaskType

_HALVES = ("A", "B")
#: kinds of models in which PEFT refuses adapters of these layers: kernels read their weights
_READ_BY_KERNELS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d")
#: what PEFT takes for layers of packed experts in all kinds whose files transformers converts like these
_AS_IN_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def files(
    base: nn.Module,
    tower: str,
    name: ModelName,
    experts: Mapping[str, LowRankExpert],
    head: Mapping[str, Tensor],
) -> AdapterFiles:
    """The content of the adapter's folder that adds these experts to the base.

    Args:
        base: the whole base model.
        tower: the dotted name of its part that the experts' names count from; empty for all of it.
        name: what the base is called.
        experts: one or more by layer, of the dtype that they are to have.
        head: the tensors of the task's own head, by their names in the base; empty where it has none.

    Raises:
        ValueError: an expert of a layer that PEFT takes none for.
    """
    whole = {f"{tower}.{layer}".removeprefix("."): expert for layer, expert in experts.items()}
    kind = getattr(getattr(base, "config", None), "model_type", None)
    for layer in whole:
        if layer.rpartition(".")[2] in _not_loaded(kind):
            raise ValueError(
                f"layer {layer!r}: PEFT loads no adapter of it in a model of the kind {kind!r}; export one "
                "task as a plain model, or merge with `layers` that leave it out"
            )
    # PEFT takes a layer's name for that of all modules whose names end in it.
    others = [
        module
        for module, _ in base.named_modules()
        if module not in whole and any(module[dot.end() :] in whole for dot in re.finditer(r"\.", module))
    ]
    config = lora_config({layer: len(expert.A) for layer, expert in whole.items()}) | {
        "base_model_name_or_path": name.name,
        "revision": name.revision,
        "exclude_modules": others or None,
        "fan_in_fan_out": any(transposed(base.get_submodule(layer)) for layer in whole),
        "modules_to_save": sorted({path for key in head if (path := key.rpartition(".")[0])}) or None,
        **_kind(base),
    }
    tensors: Tensors = {f"{ROOT}{key}": tensor for key, tensor in head.items() if "." in key}
    for layer, expert in whole.items():
        tensors |= dict(zip(factor_names(layer), expert, strict=True))
    return AdapterFiles(config, tensors)


def _not_loaded(kind: str | None) -> tuple[str, ...]:
    """The last parts of the names of layers whose adapters PEFT does not load, in models of this kind."""
    from transformers import conversion_mapping

    kinds, layers = _READ_BY_KERNELS
    if kind in kinds:
        return layers
    like: str = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind, "")
    return _AS_IN_EXPERTS.get(like, ())


def _kind(base: nn.Module) -> dict[str, Any]:
    """How PEFT finds the class of the base: by the kind of its task where it generates, or by its name."""
    model: Any = base
    if class_in_transformers(base) and model.can_generate():
        encoder = getattr(model.config, "is_encoder_decoder", False)
        return {"task_type": "SEQ_2_SEQ_LM" if encoder else "CAUSAL_LM", "auto_mapping": None}
    found = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {"task_type": None, "auto_mapping": found}


def class_in_transformers(base: nn.Module) -> str | None:
    """The name of the base's class; None where it is not from transformers."""
    return type(base).__name__ if type(base).__module__.startswith("transformers.") else None


def ranks(experts: Mapping[str, LowRankExpert]) -> str:
    """The ranks of an adapter in words."""
    lowest, highest = (end(len(expert.A) for expert in experts.values()) for end in (min, max))
    return str(highest) if lowest == highest else f"{lowest} to {highest}"


def beside(kept: Tensors, experts: Mapping[str, LowRankExpert]) -> Tensors:
    """What is kept of a task beside its experts."""
    factors = {f"{layer}.{half}" for layer in experts for half in _HALVES}
    return {name: tensor for name, tensor in kept.items() if name not in factors}


def tensors_in(adapters: Adapters, task: TaskType, base: nn.Module) -> tuple[list[Tensors], Tensors]:
    """What a merger restores itself from: the tensors of each task, and those of all tasks together.

    Args:
        adapters: the folder.
        task: its task type.
        base: the whole base model.

    Raises:
        CheckpointError: an adapter that cannot be read, or that is of something else than the tower.
    """
    tower, head = task.tower(base), task.heads(base)
    prefix = f"{tower}." if tower else ""
    tasks, state = adapters.router()
    for name, tensors in zip(adapters.names(), tasks, strict=True):
        if name is not None:
            for layer, expert in adapter_files.read(adapters.folder / name, only=head).experts().items():
                if not layer.startswith(prefix):
                    raise CheckpointError(f"{adapters.folder / name}: layer {layer!r} is not in {tower!r}")
                own = layer.removeprefix(prefix)
                tensors |= {f"{own}.{half}": t for half, t in zip(_HALVES, expert, strict=True)}
    return tasks, state
