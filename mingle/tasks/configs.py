"""Configurations in hub format, and whether two of them compute the same from the same weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mingle.io.files import CheckpointError, contained, read_json
from mingle.io.state_dicts import DEQUANTISE, IncompatibleModel
from mingle.options import shown

CONFIG = "config.json"
#: transformers fetches and runs what these can name
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_SHOWN, _MAX_LABELS = 5, 100_000
#: transformers 5 writes infinity as {"__float__": "Infinity"}
_FLOAT = "__float__"
#: Settings of training, generation, outputs and heads that are not merged, and notes on a model's past.
#: Which tensors are tied, and how many tokens there are, is judged by the files.
_NO_MATTER = re.compile(
    r"_.*|.*dropout.*|.*layerdrop|initializer_.*|.*loss.*|gradient_checkpointing|use_cache|output_.*|prefix"
    r"|return_dict.*|torchscript|torch_dtype|dtype|use_bfloat16|architectures|model_type|transformers_version"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|tokenizer_class"
    r"|.*_token_id|tie_.*|vocab_size|logit_scale_init_value|projection_dim|name_or_path"
)


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        CheckpointError: none there, a broken one, one without a model type, or that of a quantised model.
    """
    path = contained(folder, CONFIG)
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path}: no model_type in it")
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
        by = f", by {shown(kind)}" if kind else ""
        raise CheckpointError(f"{path}: quantization_config is set{by}; {DEQUANTISE}")
    return config


def config_class_of(config: Mapping[str, Any]) -> Any:
    """The class in transformers of a configuration, by its model type; `ValueError` for an unknown one."""
    import transformers

    kind = config["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model_type: transformers {transformers.__version__} knows no kind {shown(kind)} without code "
            "from elsewhere; for a model of your own give a task_type, see mingle.tasks.TaskType"
        )
    return transformers.CONFIG_MAPPING[kind]


def broken() -> tuple[type[Exception], ...]:
    """What transformers and torch raise for values of a wrong type, sizes that do not fit and unknown names.

    Asked for only once something was raised: the hub's package would slow down every start.
    """
    from huggingface_hub.errors import StrictDataclassError

    return (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError),
        *(StrictDataclassError, TypeError, ValueError),
    )


def parsed(config_class: type[Any], config: Mapping[str, Any], path: Path) -> Any:
    """The configuration object for plain data, with the defaults of its class.

    Raises:
        CheckpointError: values that the class does not take, or that name code or another file to load; the
            message names the file.
    """
    for name, value in with_parts(config):
        if name == "num_labels" and isinstance(value, int) and value > _MAX_LABELS:
            raise CheckpointError(f"{path}: num_labels={shown(value)}: expected at most {_MAX_LABELS}")
        if name in _ATTENTION and value not in (None, "eager", "sdpa"):
            raise CheckpointError(f"{path}: {name}={shown(value)}: only 'eager' and 'sdpa' come without code")
        if name == "transformers_weights":
            raise CheckpointError(
                f"{path}: {name}={shown(value)}: weights are read from the usual files only"
            )
    try:
        return config_class.from_dict(_with_floats(dict(config)))
    except broken() as error:
        reason = shown(str(error))
        raise CheckpointError(f"{path}: not a configuration of {config_class.__name__}: {reason}") from error


def _with_floats(value: Any) -> Any:
    """Plain data with the numbers that JSON has no form for, as transformers 5 writes them."""
    if isinstance(value, list):
        return [_with_floats(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT} and value[_FLOAT] in ("Infinity", "-Infinity", "NaN"):
        return float(value[_FLOAT])
    return {name: _with_floats(part) for name, part in value.items()}


def with_parts(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All names and values, also of the configurations of parts."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from with_parts(value)


def _that_matter(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings that a computation depends on, those of parts too, by their dotted names."""
    for name, value in config.items():
        if _NO_MATTER.fullmatch(str(name)):
            continue
        if isinstance(value, Mapping):
            yield from _that_matter(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def check_same_computation(base: Any, part: str, tuned: Path | Any) -> None:
    """Refuse a fine-tuned model that computes something else from the same weights.

    Args:
        base: the base model's configuration, an object of transformers; with any other, nothing is compared.
        part: the name in it of the configuration of the tower; empty where the tower is the whole model.
        tuned: the fine-tuned model's folder, or the configuration of the whole model or of its tower.

    Raises:
        IncompatibleModel: another kind of model, or settings that differ, with their names and values.
        CheckpointError: a folder with a broken configuration; one without any is accepted.
    """
    comparable = isinstance(tuned, Path) or hasattr(tuned, "to_dict")
    if not (comparable and hasattr(base, "to_dict")):
        return
    wanted = getattr(base, part) if part else base
    if isinstance(tuned, Path):
        if not (tuned / CONFIG).exists():
            return
        where, content = f"{tuned / CONFIG}: ", read_config(tuned)
        known = {config.model_type: type(config) for config in (wanted, base)}
        if content["model_type"] not in known:
            expected = " or ".join(map(repr, sorted(known)))
            raise IncompatibleModel(
                f"{where}model_type is {shown(content['model_type'])}, expected {expected}"
            )
        tuned = parsed(known[content["model_type"]], content, tuned / CONFIG)
    else:
        where = "its configuration: "
    if part and tuned.model_type == base.model_type:
        tuned = getattr(tuned, part)
    here, there = dict(_that_matter(wanted.to_dict())), dict(_that_matter(tuned.to_dict()))
    # Files of different ages note different settings; those that the class knows are in both.
    differing = [
        f"{name} is {shown(there[name])} and in the base {shown(value)}"
        for name, value in sorted(here.items())
        if name in there and there[name] != value
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise IncompatibleModel(
            f"{where}{'; '.join(differing[:_SHOWN])}{more}: with other settings the same weights compute "
            "something else"
        )
