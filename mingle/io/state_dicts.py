"""Two states of one architecture: which tensor is which, and what fine-tuning changed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from mingle.io.lazy_tensors import blocks_of, described, row_blocks
from mingle.kernels.dtypes import wide
from mingle.options import closest

#: what to do with integers or packed values where weights are expected
DEQUANTISE = "only floating-point weights can be merged: dequantise the model first"


class IncompatibleModel(ValueError):
    """A fine-tuned model whose parameters are not those of the base."""


def own_names(
    base: Mapping[str, torch.Tensor],
    tuned: Mapping[str, torch.Tensor],
    prefixes: Iterable[str] = (),
    first: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, str]:
    """The base's names, in its order, with the name that each tensor has in `tuned`.

    Only names, shapes and dtypes count here, so tensors may be on the meta device.

    Args:
        base: the reference state, by name.
        tuned: another state of the same architecture; where a prefix matches, tensors without it are ignored.
        prefixes: what `tuned` may put before the base's names, most specific first (for example
            ``vision_model.``); no prefix at all is tried last.
        first: the base's `first_names`; of the tensors that it ties together, `tuned` needs only one.
        optional: names of the base that `tuned` may lack; those that it does are left out.

    Raises:
        IncompatibleModel: missing, extra or differently shaped tensors, with a list of each and the closest
            match; integers where the base has floating-point numbers.
    """
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tuned)), "")
    # Older checkpoints store this counter as a tensor; it is not a parameter.
    own = {
        name.removeprefix(prefix): name
        for name in tuned
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    if first is not None:
        held = {first[name]: source for name, source in own.items() if name in first}
        own = {name: held[first[name]] for name in base if first[name] in held} | own
    missing = [name for name in base if name not in own and name not in optional]
    extra = [name for name in own if name not in base]
    shared = {name: tuned[own[name]] for name in base if name in own}
    differing = [
        f"{name} {list(tensor.shape)} instead of {list(base[name].shape)}"
        for name, tensor in shared.items()
        if tensor.shape != base[name].shape
    ]
    if missing or extra or differing:
        reasons = [*_differences(missing, extra, differing)]
        if any(_quantised(name, tuned[own[name]]) for name in own):
            reasons.append(DEQUANTISE)
        raise IncompatibleModel(f"not a fine-tuned version of the base: {'; '.join(reasons)}")
    codes = [
        f"{name} holds {tensor.dtype}"
        for name, tensor in shared.items()
        if base[name].is_floating_point() and not tensor.is_floating_point()
    ]
    if codes:
        others = f", and so do {len(codes) - 1} others" if len(codes) > 1 else ""
        raise IncompatibleModel(f"{codes[0]}{others}; {DEQUANTISE}")
    return {name: own[name] for name in base if name in own}


def _quantised(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like the packed weights of a quantised model, or like their scales."""
    return not tensor.is_floating_point() or name.endswith(("scale", "scale_inv", "scales", "absmax"))


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


def state_hash(source: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    digest = hashlib.sha256()
    for name in sorted(tensors):
        whole = described(tensors, name)
        digest.update(f"{name}:{whole.dtype}:{tuple(whole.shape)};".encode())
        for block in blocks_of(tensors, name):
            tensor = block.detach().cpu().contiguous()
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def task_vector(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Δ = θ_t − θ₀ of the named tensors, in float32 or wider."""
    return {name: tuned[name].to(wide(tuned[name])) - base[name].to(wide(base[name])) for name in names}


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal where both are rounded to the less precise of their dtypes."""
    if a.is_floating_point() and b.is_floating_point():
        coarse = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        a, b = (x.to(coarse) for x in (a, b))
        if coarse.itemsize == 1:  # torch.equal has no float8 kernels
            a, b = a.float(), b.float()
    return torch.equal(a, b)


def non_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """How many values of a tensor are NaN or infinite, and where the first is; empty if none is.

    Args:
        tensor: the tensor.
        dtype: that it is rounded to first; None for its own.
    """
    count, index = 0, list[int]()
    for rows in row_blocks(tensor):  # the tests for a whole tensor take as much memory as it does
        block = tensor[rows].to(dtype or tensor.dtype)
        block = block.float() if block.dtype.itemsize == 1 else block  # float8 has no kernels for this
        # A sum is finite only where all that is summed is. It takes a twentieth of the time that looking at
        # every value does, and no memory; only of very large values it may be infinite all the same.
        if not (block.is_floating_point() or block.is_complex()) or bool(block.sum().isfinite()):
            continue
        bad = ~torch.isfinite(block)
        if bad.any():
            if not count:
                first = torch.unravel_index(bad.flatten().byte().argmax(), bad.shape)
                index = [int(coordinate) for coordinate in first]
                if isinstance(rows, slice):
                    index[0] += rows.start
            count += int(bad.sum())
    return f"{count} of {tensor.numel()} values are not finite, the first at {tuple(index)}" if count else ""
