"""The names that tensors of a checkpoint have in the model that transformers makes of it.

transformers 5 has renamed tensors of some architectures and packs the experts of mixtures into one tensor,
while their files go on using the names that they always had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn


class Source(NamedTuple):
    """Where a tensor of a model comes from.

    Attributes:
        files: the names in the checkpoint, one or several.
        converted: whether more than its name changes, as where tensors are packed together.
    """

    files: tuple[str, ...]
    converted: bool


def sources(model: nn.Module, names: Iterable[str], *, complete: bool = False) -> dict[str, Source]:
    """Names in a model of the class of `model` → where its tensors are in a checkpoint.

    Args:
        model: of transformers; any other keeps all names.
        names: in the checkpoint.
        complete: add or take away the prefix by which a model without a head differs from one with a head,
            so that the names are those in `model` itself.
    """
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return {name: Source((name,), False) for name in sorted(names)}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    whole: Any = model
    rules: list[Any] = get_model_conversion_mapping(whole)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    prefix, state = (whole.base_model_prefix or None, whole.state_dict()) if complete else (None, None)
    found: dict[str, Source] = {}
    for name in sorted(names):  # some of the rules count on this order
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        targets = [renamed]
        if pattern is not None:
            rule = next(rule for rule in converters if pattern in rule.source_patterns)
            first, *others = rule.target_patterns
            targets += [renamed.replace(first, other, 1) for other in others]
        for target in targets:
            known = found[target].files if target in found else ()
            found[target] = Source((*known, name), pattern is not None)
    return found


def is_left_over(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint's tensor is one that older versions stored and that is not a parameter now."""
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    if name in state or f"{prefix}.{name}" in state:
        return False
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return name.endswith(("position_ids", "rotary_emb.inv_freq")) or any(
        re.search(pattern, name) for pattern in patterns
    )
