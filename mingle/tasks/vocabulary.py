"""The head of a language model apart from the rest: logits of some positions, without those of all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mingle.nn.early_stop import run_until
from mingle.nn.linear import MingleLinear

logger = logging.getLogger(__name__)

#: how far logits may be from the model's own, relative to the largest
_TOLERANCE = 1e-3


class _Head(nn.Module):
    """Applies a head to given hidden states, whatever it is called with."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.hidden: Tensor | None = None

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.head(self.hidden)


class _Recorded(nn.Module):
    """Answers with a recorded result."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.result


class Vocabulary:
    """What makes logits of a language model's last hidden states.

    It is the model's output embeddings and what the model does with their result: a scale, a cap, a bias.
    Nothing of that is known by name: the ``forward`` of the model itself is run, in a shell whose parts are
    stand-ins: the head takes what it is given, and the others answer with their results for a few tokens.
    The rest of the model is not kept alive.

    Args:
        stand_in: for the head.
        shell: the copy of the module that calls it.
        args, kwargs: what that module was called with for the few tokens.
    """

    def __init__(
        self, stand_in: _Head, shell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._stand_in, self._shell, self._args, self._kwargs = stand_in, shell, args, kwargs
        weight: Any = stand_in.head.weight
        #: how many tokens there are, V
        self.size = int(weight.shape[0])

    def learning(self) -> tuple[Tensor, ...]:
        """The head's own tensors that learn, as they stand in it now."""
        return tuple(tensor for tensor in self._stand_in.head.parameters() if tensor.requires_grad)

    def inputs(self, run: Callable[[], object]) -> Tensor:
        """What the head is given in a forward pass of the model, [n, L, d]; the pass ends there."""
        seen: list[Tensor] = []
        run_until(
            [self._stand_in.head], run, lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0])
        )
        return seen[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, V] of positions with hidden states [n, d]."""
        shell: Any = self._shell
        self._stand_in.hidden = hidden.unsqueeze(0)
        try:
            result: Tensor = shell.forward(*self._args, **self._kwargs).logits
        finally:
            self._stand_in.hidden = None
        return result.squeeze(0)


def _without_parts(module: nn.Module, stand_ins: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of a module whose parts have others in their places, or are hollow where they have none."""
    shell = copy.copy(module)
    shell._modules = {}
    for name, part in module._modules.items():
        if part is None or part in stand_ins:
            shell._modules[name] = None if part is None else stand_ins[part]
        else:  # never called itself
            shell._modules[name] = hollow = _without_parts(part, stand_ins)
            hollow._parameters = dict.fromkeys(part._parameters)
    return shell


def output_embeddings(model: nn.Module) -> Any:
    """The module that makes a language model's logits, whose weight is [V, d]; None where there is none."""
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if getattr(head, "weight", None) is None else head


@torch.no_grad()
def find_vocabulary(model: nn.Module, run: Callable[[], Tensor]) -> Vocabulary | None:
    """The head of a language model; None where its logits cannot be had apart from the rest.

    Args:
        model: in evaluation mode.
        run: a forward pass for a few tokens, which calls `model`; its result is the model's own logits
            [n, L, V] for them.
    """
    from mingle.tasks.configs import broken

    head = output_embeddings(model)
    names = [name for name, module in model.named_modules() if module is head]
    if not names or isinstance(head, MingleLinear):
        return None
    parent = model.get_submodule(names[0].rpartition(".")[0])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    results: dict[nn.Module, Any] = {}
    hidden: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def keep(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if module is not parent:
            results[module] = result
        if module is head:
            hidden.append(args[0])

    handles = [parent.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [part.register_forward_hook(keep) for part in parent.modules()]
    try:
        expected = run()
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1 or len(hidden) != 1:
        return None
    stand_in = _Head(head)
    shell = _without_parts(
        parent, {**{part: _Recorded(result) for part, result in results.items()}, head: stand_in}
    )
    found = Vocabulary(stand_in, shell, *calls[0])
    try:
        states = found.inputs(run).flatten(0, -2)
        logits = found.logits(states).view(*hidden[0].shape[:-1], -1)[tuple(map(slice, expected.shape))]
    except broken() as error:
        logger.info("%s makes whole logits: its head cannot be had alone: %s", type(model).__name__, error)
        return None
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())
    ):
        logger.info("%s makes whole logits: those of its head alone are others", type(model).__name__)
        return None
    return found
