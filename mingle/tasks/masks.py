"""Padding: which tokens injected layers see does not depend on what a sample shares a batch with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from mingle.nn.linear import MingleLinear

_answers: ContextVar[Tensor | None] = ContextVar("which of a decoder's tokens count", default=None)


@contextmanager
def answer_mask(mask: Tensor | None) -> Iterator[None]:
    """While the block runs, these of a decoder's tokens count, bool [n, L]; None counts all.

    For decoders that read their answers without a mask: what follows the end of one is not looked at.
    """
    token = _answers.set(mask)
    try:
        yield
    finally:
        _answers.reset(token)


class TokenMasks:
    """Forward hooks that tell layers with experts which of their tokens are padding.

    They take the ``attention_mask`` [n, N] that the model, or one of its parts, is called with.  Copied and
    pickled with the model.

    Args:
        layers: those that see the tokens which this mask is about.
        answering: those of a decoder that see its own tokens, for `answer_mask`.
    """

    def __init__(self, layers: Sequence[MingleLinear], answering: Sequence[MingleLinear] = ()) -> None:
        self.layers, self.answering = list(layers), list(answering)
        #: the module whose call set the masks, and will clear them
        self.owner: nn.Module | None = None

    def register(self, model: nn.Module, inner: str) -> None:
        """Hook the model and its parts on the way to the module `inner`: any of them may be called."""
        parts = inner.split(".") if inner else []
        for depth in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:depth]))
            names = tuple(inspect.signature(module.forward).parameters)
            module.register_forward_pre_hook(partial(self.set, names), with_kwargs=True)
            module.register_forward_hook(self.clear, always_call=True)

    def set(
        self, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before a call of a module whose arguments have these names."""
        if self.owner is not None:
            return
        given = dict(zip(names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        self.owner = module
        # With a key-value cache the mask also covers what was seen before.
        tokens = next((t for t in map(given.get, ("input_ids", "inputs_embeds")) if t is not None), mask)
        for layer in self.layers:
            layer.token_mask = mask[:, -tokens.shape[1] :].bool()
        for layer in self.answering:
            layer.token_mask = _answers.get()

    def clear(self, module: nn.Module, *_: Any) -> None:
        """After the call, however it ended."""
        if self.owner is module:
            self.owner = None
            for layer in (*self.layers, *self.answering):
                layer.token_mask = None
