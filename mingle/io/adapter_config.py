"""The configuration of a PEFT LoRA adapter: its ranks and scalings, and why it cannot be read."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mingle.io.files import CheckpointError, contained, read_json
from mingle.io.patterns import Ending
from mingle.options import shown

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 5
#: what to do about an adapter that cannot be read
OR_WHOLE = "where peft's merge_and_unload makes a whole model of it, give that"

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
_BIASES = ("none", "all", "lora_only")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says about ranks and scalings.

    Attributes:
        path: of the file.
        r, alpha: the rank and α of every layer that no pattern matches.
        rslora: whether the scaling is α / √r instead of α / r.
        dora: whether each row of an updated weight has a length of its own.
        rank_pattern, alpha_pattern: key → the ending of names that it stands for, and the value of the layers
            with such a name.
    """

    path: Path
    r: int
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: dict[str, tuple[Ending, int]]
    alpha_pattern: dict[str, tuple[Ending, float]]

    def rank(self, module: str) -> int:
        return _resolve(self.rank_pattern, module, self.r, f"{self.path}: rank_pattern")

    def scaling(self, module: str) -> float:
        alpha = _resolve(self.alpha_pattern, module, self.alpha, f"{self.path}: alpha_pattern")
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @classmethod
    def read(cls, folder: Path, more: Collection[str] = ()) -> AdapterConfig:
        """The configuration in an adapter's folder.

        Args:
            folder: of the adapter.
            more: options that the caller knows, of those that make an adapter more than a sum of low-rank
                updates.

        Raises:
            CheckpointError: none there, a broken one, or that of an adapter which is more than a sum of
                low-rank updates or does not fit the base as it is.
        """
        path = contained(folder, CONFIG)
        if not path.is_file():
            inside = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
            raise CheckpointError(
                f"{folder}: no {CONFIG}"
                + (f"; there is one in {', '.join(inside[:_SHOWN])}" if inside else "")
            )
        config = read_json(path)
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        _check_kind(path, config, more)
        _check_init(path, config.get("init_lora_weights", True))
        ranks = {
            key: (ending, _rank(path, f"rank_pattern: {shown(key)[1:-1]}", value))
            for key, (ending, value) in _compile(path, config, "rank_pattern").items()
        }
        alphas = {
            key: (ending, _number(path, f"alpha_pattern: {shown(key)[1:-1]}", value))
            for key, (ending, value) in _compile(path, config, "alpha_pattern").items()
        }
        rank, alpha = _rank(path, "r", config.get("r")), _number(path, "lora_alpha", config.get("lora_alpha"))
        return cls(
            path, rank, alpha, bool(config.get("use_rslora")), bool(config.get("use_dora")), ranks, alphas
        )


def lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of a finished adapter whose scaling is 1 in every layer.

    Args:
        ranks: layer of the whole model → rank.
    """
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
    }


def _resolve(patterns: Mapping[str, tuple[Ending, V]], module: str, default: V, where: str) -> V:
    """The value of the first pattern that matches the module's name."""
    matching = {key: value for key, (ending, value) in patterns.items() if ending.matches(module)}
    if len(set(matching.values())) > 1:
        # PEFT sorts the patterns when it saves them, so the order that the adapter was trained with is lost.
        logger.warning(
            "%s: layer %r matches %s; the first one counts", where, module, ", ".join(map(repr, matching))
        )
    return next(iter(matching.values()), default)


def _check_kind(path: Path, config: Mapping[str, Any], more: Collection[str]) -> None:
    """Refuse an adapter that is more than a sum of low-rank updates, but for what some options make of it."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type={shown(config.get('peft_type'))}: only LORA adapters can be read"
        )
    for option, effect in _REFUSED.items():
        if config.get(option) and option not in more:
            raise CheckpointError(
                f"{path}: {option} is set, which {effect}: "
                f"the adapter is more than low-rank updates of linear layers; {OR_WHOLE}"
            )
    known = _BIASES if "bias" in more else _BIASES[:1]
    if (bias := config.get("bias", "none")) not in known:
        listed = " and ".join(map(repr, known))
        raise CheckpointError(f"{path}: bias={shown(bias)}: only {listed} can be read; {OR_WHOLE}")


def _check_init(path: Path, init: Any) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        return
    hint = ""
    if isinstance(init, str) and init.lower().startswith(_CONVERTIBLE_INITS):
        conversion = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        hint = f"; save it with {conversion}, which makes it a plain LoRA adapter"
    raise CheckpointError(
        f"{path}: init_lora_weights={shown(init)} is not known to leave the base weights as they are{hint}"
    )


def _compile(path: Path, config: Mapping[str, Any], option: str) -> dict[str, tuple[Ending, Any]]:
    """The patterns of a `*_pattern` option: regular expressions for whole last components of a name."""
    patterns = config.get(option) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {option}: expected a JSON object")
    endings = {}
    for key, value in patterns.items():
        try:
            endings[key] = (Ending(key), value)
        except ValueError as error:
            wrong = f"{shown(key)} is not a regular expression that can be read: {error}"
            raise CheckpointError(f"{path}: {option}: {wrong}") from error
    return endings


def _rank(path: Path, option: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{path}: {option}={shown(value)}: expected a positive integer")
    return value


def _number(path: Path, option: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{path}: {option}={shown(value)}: expected a finite number")
    return float(value)
