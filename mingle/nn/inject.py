"""Swap the target Linears of a model for `MingleLinear`, and back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mingle.nn.conv1d import is_conv1d
from mingle.nn.linear import MingleLinear
from mingle.nn.linear_subclasses import computes_linear
from mingle.nn.matrices import AnyLinear, Layout, is_linear, packed_experts, transposed
from mingle.options import nearest


def matches(name: str, suffix: str) -> bool:
    """Whether the dotted module name ends in whole components: ``fc1`` fits ``mlp.fc1``, not ``mlp.xfc1``."""
    return name == suffix or name.endswith("." + suffix)


def refusal(module: nn.Module, parent: nn.Module) -> str:
    """Why `module`, a child of `parent`, cannot take experts; empty where it can."""
    if not (computes_linear(module) or is_conv1d(module) or isinstance(module, MingleLinear)):
        return f"is a {type(module).__name__}, not a torch.nn.Linear: it cannot take experts"
    if isinstance(parent, nn.TransformerEncoderLayer):
        reader = "torch.nn.TransformerEncoderLayer"
        return f"cannot take experts: {reader} reads its weight in inference and would skip them"
    return ""


def find_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, AnyLinear]:
    """The linear (or already injected) layers whose names end in one of `targets`, in model order.

    Raises:
        ValueError: a target that no layer matches (the message names the nearest one), or that matches
            something other than a plain Linear or Conv1D.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    modules = dict(model.named_modules())
    found: dict[str, AnyLinear] = {}
    for name, module in modules.items():
        if not any(matches(name, target) for target in targets):
            continue
        if reason := refusal(module, modules[name.rpartition(".")[0]]):
            raise ValueError(f"layer {name!r} {reason}")
        assert is_linear(module)
        found[name] = module
    linear = {name for name, module in modules.items() if is_linear(module)}
    for target in targets:
        if not any(matches(name, target) for name in found):
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear} | linear)
            raise ValueError(f"no Linear layer's name ends in {target!r}{nearest(target, suffixes)}")
    return found


def find_weights(model: nn.Module, targets: Iterable[str]) -> dict[str, Layout]:
    """The weights of the layers that `find_targets` finds, and the packed experts named likewise.

    Raises:
        ValueError: see `find_targets`; a target may match either or both.
    """
    targets = tuple(targets)
    packed = {
        name: layout
        for name, layout in packed_experts(model).items()
        if any(matches(name, target) for target in targets)
    }
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    layers = [
        target
        for target in targets
        if any(matches(name, target) for name in linear) or not any(matches(name, target) for name in packed)
    ]
    return {
        f"{name}.weight": Layout(transposed(layer)) for name, layer in find_targets(model, layers).items()
    } | packed


def inject(
    model: nn.Module,
    targets: Iterable[str],
    reduce: str = "sample",
    *,
    backend: str = "auto",
    prepack: bool = False,
) -> dict[str, MingleLinear]:
    """Replace, in place, every Linear or Conv1D whose name ends in one of `targets` by a `MingleLinear`.

    The new layer shares the old one's weight.

    Args:
        model: any module.
        targets: exact dotted suffixes, such as ``("q_proj", "mlp.fc1")``, or one of them.
        reduce: what the gates see; see `mingle.functional.gated_experts`.
        backend: see `mingle.functional.gated_experts`.
        prepack: see `MingleLinear`.

    Returns:
        The injected layers by name, in model order.  Layers that were injected before stay as they are.

    Raises:
        ValueError: a target that matches nothing, or something other than a plain Linear.  The model is then
            unchanged.
    """
    layers: dict[str, MingleLinear] = {}
    for name, module in find_targets(model, targets).items():
        if not isinstance(module, MingleLinear):
            module = MingleLinear.from_linear(module, reduce, backend=backend, prepack=prepack)
            model.set_submodule(name, module)
        layers[name] = module
    return layers


def restore(model: nn.Module) -> list[str]:
    """Put the base layer back in place of every `MingleLinear` and return the layers' names.

    Experts and gates are dropped.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MingleLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())
    return list(layers)
