"""What fine-tuning changed: the difference between two checkpoints of one architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mingle.kernels.dtypes import wide
from mingle.options import closest


class IncompatibleModel(ValueError):
    """A fine-tuned model whose parameters are not those of the base."""


def align(
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    prefixes: Iterable[str] = (),
    first: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of `tuned` under the names of `base`, in the base's order.

    Args:
        base: the reference state, by name.
        tuned: another state of the same architecture; where a prefix matches, tensors without it are ignored.
        prefixes: what `tuned` may put before the base's names, most specific first (for example
            ``vision_model.``); no prefix at all is tried last.
        first: the base's `first_names`; of the tensors that it ties together, `tuned` needs only one.

    Raises:
        IncompatibleModel: missing, extra or differently shaped tensors, with a list of each and the closest
            match.
    """
    stripped = dict(tuned)
    for prefix in prefixes:
        inside = {
            name.removeprefix(prefix): tensor for name, tensor in tuned.items() if name.startswith(prefix)
        }
        if inside:
            stripped = inside
            break
    # Older checkpoints store this counter as a tensor; it is not a parameter.
    stripped = {name: tensor for name, tensor in stripped.items() if not name.endswith("position_ids")}
    if first is not None:
        held = {first[name]: tensor for name, tensor in stripped.items() if name in first}
        stripped = {name: held[first[name]] for name in base if first[name] in held} | stripped
    missing = [name for name in base if name not in stripped]
    extra = [name for name in stripped if name not in base]
    differing = [
        f"{name} {list(stripped[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in base.items()
        if name in stripped and stripped[name].shape != tensor.shape
    ]
    if missing or extra or differing:
        raise IncompatibleModel(
            "not a fine-tuned version of the base: " + "; ".join(_differences(missing, extra, differing))
        )
    return {name: stripped[name] for name in base}


def _differences(missing: list[str], extra: list[str], differing: list[str], shown: int = 5) -> Iterable[str]:
    for label, names in (("missing", missing), ("extra", extra), ("of another shape", differing)):
        if names:
            rest = f" and {len(names) - shown} more" if len(names) > shown else ""
            yield f"{len(names)} {label}: {', '.join(names[:shown])}{rest}"
    if missing and (near := closest(missing[0], extra)):
        yield f"{missing[0]!r} may be {near!r}"


def first_names(module: nn.Module) -> dict[str, str]:
    """Every name in the module's state → the first name of the same tensor; they differ where it is tied."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name) for name, tensor in module.state_dict(keep_vars=True).items()
    }


def task_vector(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Δ = θ_t − θ₀ of the named tensors, in float32 or wider."""
    return {name: tuned[name].to(wide(tuned[name])) - base[name].to(wide(base[name])) for name in names}
