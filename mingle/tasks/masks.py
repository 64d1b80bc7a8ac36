"""Which tokens count: padding does nowhere, and what follows a prompt does not in a decision on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mingle.nn.kv_cache import cache_in, length
from mingle.nn.linear import MingleLinear

_answers: ContextVar[Tensor | None] = ContextVar("which of a decoder's tokens count", default=None)
#: of the tokens that a decoder is called with, those of the prompt: a mask, or how many come first
_prompts: ContextVar[Tensor | int | None] = ContextVar(
    "which of a decoder's tokens are a prompt", default=None
)


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


@contextmanager
def prompt(tokens: Tensor | int | None) -> Iterator[None]:
    """While the block runs, only these of a decoder's tokens are its prompts, which a router decides on.

    Args:
        tokens: bool [n, S], or the number of columns that they take up, the first ones; None for all.
    """
    token = _prompts.set(tokens)
    try:
        yield
    finally:
        _prompts.reset(token)


def prompt_length() -> int:
    """How many columns prompts take up, the first ones of their calls; 0 where nobody has said so."""
    tokens = _prompts.get()
    return tokens if isinstance(tokens, int) else 0


def prompt_tokens(hidden: Tensor, counted: Tensor | None) -> Tensor | None:
    """Which tokens of hidden states [n, N, d] are those of prompts, bool [n, N]; None where all are.

    Args:
        hidden: what a decoder makes of its tokens.
        counted: which are not padding, bool [n, N]; None where all are not.
    """
    tokens, shape = _prompts.get(), hidden.shape[:2]
    if isinstance(tokens, int):
        tokens = (torch.arange(shape[1], device=hidden.device) < tokens).expand(shape)
    if tokens is None or tokens.shape != shape or bool(tokens.all()):
        return counted
    tokens = tokens.to(hidden.device)
    if counted is None:
        counted = torch.ones_like(tokens)
    prompts = tokens & counted
    return torch.where(prompts.any(1, keepdim=True), prompts, counted)  # an answer may come without a prompt


class TokenMasks:
    """Forward hooks that tell layers with experts which of their tokens are padding.

    They take the ``attention_mask`` that the model, or one of its parts, is called with: [n, N], or what
    `transformers` makes of it for a static cache.  Copied and pickled with the model.

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
        mask, cache = given.get("attention_mask"), cache_in(given.values())
        tokens = next((t for t in map(given.get, ("input_ids", "inputs_embeds")) if t is not None), mask)
        counted = _counted(mask, tokens, 0 if cache is None else length(cache))
        if counted is None:
            return
        self.owner = module
        for layer in self.layers:
            layer.token_mask = counted
        for layer in self.answering:
            layer.token_mask = _answers.get()

    def clear(self, module: nn.Module, *_: Any) -> None:
        """After the call, however it ended."""
        if self.owner is module:
            self.owner = None
            for layer in (*self.layers, *self.answering):
                layer.token_mask = None


def _counted(mask: Any, tokens: Any, seen: int) -> Tensor | None:
    """Which of the tokens of a call count, bool [n, N]; None where its mask does not tell.

    Args:
        mask: the call's ``attention_mask``.
        tokens: [n, N, ...].
        seen: how many tokens are in its key-value cache.
    """
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor):
        return None
    if mask.dim() == 2:  # it also covers what was seen before
        return mask[:, -tokens.shape[1] :].bool()
    if mask.dim() == 4 and seen == 0:  # [n, 1, N, M]: what counts sees itself
        own = mask[:, 0].diagonal(dim1=1, dim2=2)
        return (own if own.dtype == torch.bool else own == 0).expand(len(tokens), -1)
    return None
