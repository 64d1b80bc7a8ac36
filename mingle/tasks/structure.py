"""The structure of a transformer, found by looking at it: its blocks, and which layers in them do what.

No architecture is known by name.  The blocks are the outermost lists of modules of one class; what a layer
does follows from its name (attention or not) and from what it reads when two samples pass through a copy of
the model that has no weights.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from mingle.nn.call_arguments import takes
from mingle.nn.inject import matches, refusal
from mingle.nn.matrices import is_linear, widths

logger = logging.getLogger(__name__)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
#: samples that pass through the copy, in two passes: what belongs to a sample grows in proportion
_SAMPLES = (2, 3)


@dataclass(frozen=True)
class Stack:
    """Blocks that pass hidden states on from one to the next.

    Attributes:
        parent: the dotted name of the module that runs them; empty for the whole.
        blocks: their own dotted names, in order.
    """

    parent: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What is where in a tower; all names are dotted names inside it.

    Attributes:
        stacks: in the order in which inputs pass through them: an encoder's comes before its decoder's.
        sets: named sets of linear layers that can take experts: ``full`` are all of those in the blocks,
            ``attention`` those below a module named so, ``mlp`` the others, and ``light`` those of both that
            read a block's input: q, k, v and the first layers of an MLP.  Suffixes where these select
            exactly the layers, else whole names.
        layers: the same layers, each set by whole names.
        memory: the layers of a decoder that see the encoder's tokens.
        unfit: linear layers in the blocks that cannot take experts, with the reason.
    """

    stacks: tuple[Stack, ...]
    sets: Mapping[str, tuple[str, ...]]
    layers: Mapping[str, tuple[str, ...]]
    memory: frozenset[str] = frozenset()
    unfit: Mapping[str, str] = field(default_factory=dict)

    def sees_first(self, layer: str) -> bool:
        """Whether a layer sees the tokens that the first stack sees: an encoder's, where there are two."""
        later = any(self.block_of(layer) in stack.blocks for stack in self.stacks[1:])
        return layer in self.memory or not later

    def block_of(self, layer: str) -> str:
        """The block that a layer is in; empty for none."""
        blocks = (block for stack in self.stacks for block in stack.blocks)
        return next((block for block in blocks if layer.startswith(f"{block}.")), "")


@dataclass
class _Reading:
    """What a linear layer was given in one pass.

    Attributes:
        calls: how often it was called.
        tokens: the shape of its input without the last dimension.
        source: a number that layers share which were given the same tensor.
    """

    calls: int
    tokens: tuple[int, ...]
    source: int


def find_structure(
    tower: nn.Module, run: Callable[[nn.Module, int, torch.device], object] | None
) -> Structure:
    """The structure of a tower; its weights are not looked at, so they may be on the meta device.

    Args:
        tower: the part of a model that is merged.
        run: passes a number of samples through a copy of the tower, on a device; None where nobody knows
            how.  Which layers read what is then judged by their order.

    Raises:
        ValueError: no list of blocks with linear layers.
    """
    stacks = _stacks(tower)
    if not stacks:
        raise ValueError(
            f"{type(tower).__name__} has no list of blocks of one class with linear layers in them: no layer "
            "can take experts; methods that merge weights, such as average or opcm, need none"
        )
    modules = dict(tower.named_modules())
    inside: list[str] = []
    unfit: dict[str, str] = {}
    for stack in stacks:
        for block in stack.blocks:
            for name, module in modules[block].named_modules(prefix=block):
                if is_linear(module):
                    reason = refusal(module, modules[name.rpartition(".")[0]])
                    if reason:
                        unfit[name] = reason
                    else:
                        inside.append(name)
    passes = [] if run is None else _passes(tower, inside, run)
    for name in list(inside) if passes else ():
        if reason := _unfit([readings.get(name) for readings in passes]):
            unfit[name] = reason
            inside.remove(name)
    stacks = _in_order(stacks, inside, passes)
    attention = [name for name in inside if _is_attention(name, stacks)]
    readings = passes[0] if passes else {}
    light = _light(inside, attention, stacks, readings)
    layers = {
        "full": tuple(inside),
        "attention": tuple(attention),
        "mlp": tuple(name for name in inside if name not in attention),
        "light": tuple(name for name in inside if name in light),
    }
    sets = {key: _suffixes(names, stacks, modules) for key, names in layers.items()}
    return Structure(tuple(stacks), sets, layers, _memory(stacks, inside, readings), unfit)


def _stacks(tower: nn.Module) -> list[Stack]:
    """The outermost lists of modules of one class that all hold linear layers."""
    found: list[Stack] = []

    def visit(module: nn.Module, name: str, runner: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}".removeprefix(".")
            blocks = list(child.children())
            if (
                isinstance(child, nn.ModuleList | nn.Sequential)
                and len({type(block) for block in blocks}) == 1
                and not isinstance(blocks[0], nn.ModuleList)  # of a stage; nobody calls it
                and all(any(is_linear(m) for m in b.modules()) for b in blocks)
                and not all(isinstance(block, nn.Linear) for block in blocks)
            ):
                found.append(Stack(runner, tuple(f"{path}.{key}" for key, _ in child.named_children())))
            else:
                visit(child, path, runner if isinstance(child, nn.ModuleList) else path)

    visit(tower, "", "")
    return found


def _passes(
    tower: nn.Module, names: Iterable[str], run: Callable[[nn.Module, int, torch.device], object]
) -> list[dict[str, _Reading]]:
    """For each of two numbers of samples, what every linear layer read, in the order of the calls.

    Empty where the tower cannot be run: some ask for more than a configuration tells.
    """
    from mingle.tasks.configs import broken

    wanted, passes, hollow = set(names), [], _hollow(tower)
    for samples in _SAMPLES:
        readings: dict[str, _Reading] = {}
        given: list[ref[Tensor]] = []
        for name, module in hollow.named_modules():
            if is_linear(module):
                note = readings if name in wanted else {}
                stand_in = partial(_zeros, name, widths(module)[0], note, given)
                module.forward = stand_in  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                run(hollow, samples, torch.device("cpu"))
        except broken() as error:
            logger.debug("%s cannot be run without weights: %s", type(tower).__name__, error)
            return []
        passes.append(readings)
    return passes


def _hollow(tower: nn.Module) -> nn.Module:
    """A copy of the tower on the CPU, in evaluation mode, whose weights are all 0 and take no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*tower.parameters(), *tower.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        zeros = torch.zeros((), dtype=dtype).expand(tensor.shape)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(zeros, requires_grad=False) if parameter else zeros
    return copy.deepcopy(tower, memo).eval()


def _zeros(
    name: str, width: int, readings: dict[str, _Reading], given: list[ref[Tensor]], x: Tensor
) -> Tensor:
    """Stands in for a linear layer: notes what it reads, and answers with zeros [..., width]."""
    source = next((i for i, known in enumerate(given) if known() is x), len(given))
    if source == len(given):
        given.append(ref(x))
    known = readings.get(name)
    if known is None:
        readings[name] = _Reading(1, tuple(x.shape[:-1]), source)
    else:
        known.calls += 1
    return x.new_zeros(*x.shape[:-1], width)


def _unfit(readings: list[_Reading | None]) -> str:
    """Why a layer that read this in the passes cannot take gated experts; empty where it can."""
    known = [reading for reading in readings if reading is not None]
    if len(known) < len(readings):
        return "is not called in a forward pass"
    if any(reading.calls > 1 for reading in known):
        return "is called more than once in a forward pass"
    per_sample = {
        reading.tokens[0] / samples
        for reading, samples in zip(known, _SAMPLES, strict=True)
        if reading.tokens
    }
    if len(per_sample) != 1 or per_sample.pop() % 1:
        return "does not see samples apart from each other"
    return ""


def _in_order(stacks: list[Stack], inside: list[str], passes: list[dict[str, _Reading]]) -> list[Stack]:
    """The stacks in the order of their first calls."""
    order = list(passes[0]) if passes else inside
    calls = {name: i for i, name in enumerate(order)}

    def first(stack: Stack) -> int:
        own = tuple(f"{block}." for block in stack.blocks)
        return min((i for name, i in calls.items() if name.startswith(own)), default=len(calls))

    return sorted(stacks, key=first)


def _within(name: str, stacks: Iterable[Stack]) -> str:
    """A layer's name inside its block."""
    blocks = (block for stack in stacks for block in stack.blocks)
    return name.removeprefix(next(block for block in blocks if name.startswith(block + ".")) + ".")


def _is_attention(name: str, stacks: Iterable[Stack]) -> bool:
    return _ATTENTION.search(_within(name, stacks)) is not None


def _light(
    inside: list[str], attention: list[str], stacks: list[Stack], readings: Mapping[str, _Reading]
) -> set[str]:
    """Layers that do not read what others of the same attention or MLP have made.

    In the order of the calls these are all but those that read the last of their inputs.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(inside, key=list(readings).index) if readings else inside:
        groups.setdefault(_group(name, name in attention, stacks), []).append(name)
    chosen: set[str] = set()
    for names in groups.values():
        sources = [readings[name].source for name in names] if readings else list(range(len(names)))
        last = sources[-1] if len(set(sources)) > 1 else None
        chosen.update(name for name, source in zip(names, sources, strict=True) if source != last)
    return chosen


def _group(name: str, attention: bool, stacks: list[Stack]) -> str:
    """The attention that a layer is part of, or else the innermost list entry, whose MLP it is part of."""
    parts = name.split(".")
    if attention:
        start = len(parts) - len(_within(name, stacks).split("."))
        end = next(i for i in range(start, len(parts)) if _ATTENTION.search(parts[i])) + 1
    else:
        end = max(i for i, part in enumerate(parts) if part.isdigit()) + 1
    return ".".join(parts[:end])


def _memory(stacks: list[Stack], inside: list[str], readings: Mapping[str, _Reading]) -> frozenset[str]:
    """Layers of later stacks that read other tokens than their own: those of an encoder."""
    if len(stacks) < 2 or not readings:
        return frozenset()
    seen: set[str] = set()
    for stack in stacks[1:]:
        own = tuple(f"{block}." for block in stack.blocks)
        calls = [name for name in readings if name.startswith(own)]
        if calls:  # the first of them reads the stack's own tokens
            length = math.prod(readings[calls[0]].tokens)
            seen.update(name for name in calls if math.prod(readings[name].tokens) != length)
    return frozenset(name for name in inside if name in seen)


def _suffixes(names: tuple[str, ...], stacks: list[Stack], everything: Iterable[str]) -> tuple[str, ...]:
    """The shortest suffixes of two or more components that select exactly these layers; or their names."""
    for shorten in (lambda name: ".".join(name.split(".")[-2:]), lambda name: name):
        suffixes = tuple(dict.fromkeys(shorten(_within(name, stacks)) for name in names))
        chosen = {name for name in everything if any(matches(name, suffix) for suffix in suffixes)}
        if chosen == set(names):
            return suffixes
    return names


def example_inputs(module: nn.Module, samples: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a model of transformers, as its configuration describes them; ids and pixels are all 0.

    A decoder gets fewer tokens than its encoder, so that what either reads can be told apart.

    Raises:
        AttributeError: a configuration that does not say enough.
    """
    model: Any = module
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.zeros(samples, config.num_channels, height, width, device=device)}
    inputs = {"input_ids": torch.zeros(samples, 5, dtype=torch.long, device=device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(samples, 3, dtype=torch.long, device=device)
    return inputs


def run_example(module: nn.Module, samples: int, device: torch.device) -> None:
    """Pass `example_inputs` through a model of transformers."""
    given = {"use_cache": False} if takes(module, "use_cache") else {}
    module(**example_inputs(module, samples, device), **given)
