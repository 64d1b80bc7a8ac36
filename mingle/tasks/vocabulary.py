"""The head of a language model apart from the rest: logits of some positions, without those of all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mingle.nn.early_stop import run_until
from mingle.nn.linear import MingleLinear

logger = logging.getLogger(__name__)

#: how far logits may be from the model's own, relative to the largest
_TOLERANCE = 1e-3


class Vocabulary:
    """What makes logits of a language model's last hidden states.

    It is the model's output embeddings and what the model does with their result: a scale, a cap, a bias.
    Nothing of that is known by name: the ``forward`` of the model itself is run, in a shell that has no other
    part than the head; in the places of the others are their results for a few tokens.  The rest of the model
    is not kept alive.

    Args:
        head: the output embeddings.
        shell: the module that calls them, a copy with stand-ins for all of its parts.
        args, kwargs: what the module was called with for the few tokens.
    """

    def __init__(
        self, head: nn.Module, shell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.head, self._shell, self._args, self._kwargs = head, shell, args, kwargs
        weight: Any = head.weight
        #: how many tokens there are, V
        self.size = int(weight.shape[0])

    def inputs(self, run: Callable[[], object]) -> Tensor:
        """What the head is given in a forward pass of the model, [n, L, d]; the pass ends there."""
        seen: list[Tensor] = []
        run_until([self.head], run, lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]))
        return seen[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [n, V] of positions with hidden states [n, d]."""
        shell: Any = self._shell
        for part in shell.children():
            if isinstance(part, _Head):
                part.hidden = hidden.unsqueeze(0)
        try:
            result: Tensor = shell.forward(*self._args, **self._kwargs).logits
        finally:
            for part in shell.children():
                if isinstance(part, _Head):
                    part.hidden = None
        return result.squeeze(0)


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


@torch.no_grad()
def find_vocabulary(model: nn.Module, run: Callable[[], Tensor]) -> Vocabulary | None:
    """The head of a language model; None where its logits cannot be had apart from the rest.

    Args:
        model: in evaluation mode.
        run: a forward pass for a few tokens, which calls `model`; its result is the model's own logits
            [n, L, V] for them.
    """
    from mingle.tasks.configs import broken

    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = [name for name, module in model.named_modules() if module is head]
    if not names or isinstance(head, MingleLinear) or getattr(head, "weight", None) is None:
        return None
    parent = model.get_submodule(names[0].rpartition(".")[0])
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    results: dict[nn.Module, Any] = {}
    hidden: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    def keep(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        results[module] = result
        if module is head:
            hidden.append(args[0])

    handles = [parent.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [part.register_forward_hook(keep) for part in parent.children()]
    try:
        expected = run()
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1 or len(hidden) != 1:
        return None
    shell = copy.copy(parent)
    shell._modules = {
        name: _Head(part) if part is head else _Recorded(results.get(part))
        for name, part in parent._modules.items()
        if part is not None
    }
    found = Vocabulary(head, shell, *calls[0])
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
