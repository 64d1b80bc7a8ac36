"""The gates of all layers from one router: decided on once per sample, and kept for what is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mingle.methods.encodings import Encodings
from mingle.nn import kv_cache
from mingle.nn.call_arguments import by_name, first_name, takes
from mingle.nn.early_stop import run_until
from mingle.nn.linear import MingleLinear
from mingle.nn.observe import aside
from mingle.tasks.masks import prompt, prompt_length, prompt_tokens
from mingle.tasks.prompts import positions


class Moments(NamedTuple):
    """Mean and standard deviation [n, d] of samples' hidden states over their tokens."""

    mean: Tensor
    deviation: Tensor


class Router(Protocol):
    """Decides by what the base model makes of samples at the sites that it reads.

    Attributes:
        among: the tasks with an expert that it chooses among, bool [T]; None for all of them.
    """

    among: Tensor | None

    def gates(self, moments: Sequence[Moments]) -> Tensor:
        """The gates of all experts, [n, T]."""

    def likeliest(self, moments: Sequence[Moments]) -> Tensor:
        """The places [n] of the likeliest tasks among those with an expert."""

    def shares(self, moments: Sequence[Moments]) -> Tensor:
        """How much speaks for every task with an expert, [n, T], each row a sum of 1."""


class LayerRouter:
    """Hooks of a model that set all gates by what the base model makes of the same input.

    A decoder decides on its prompt.  With a key-value cache the gates are kept on the cache, and every later
    call with it has them.  Without one each call passes the whole sequence: inside ``generate`` it is known
    how much of it is the prompt, and elsewhere all tokens are.  Where an encoder has a decoder, it decides on
    the encoder's input, and the decoder's gates are those of the outputs that it reads.

    Copied and pickled with the model.

    Args:
        layers: the layers that it gives gates to, the first of them inside the encoder.
        sites: the modules of the encoder whose inputs can be read, in the order in which it calls them.
    """

    def __init__(self, layers: list[MingleLinear], sites: list[nn.Module]) -> None:
        self.layers, self.sites = layers, sites
        self.router: Router | None = None
        #: the numbers of the sites that `router` reads, in order
        self.read: tuple[int, ...] = ()
        #: where decoders read the encoder's outputs
        self.encodings: Encodings | None = None
        self._decided: Tensor | None = None

    def register(
        self, model: nn.Module, encoder: nn.Module, decoders: Mapping[nn.Module, list[MingleLinear]]
    ) -> None:
        """Hook a model.

        Args:
            model: the whole model.
            encoder: the part whose calls are decided on; a decoder, where there is only one stack of blocks.
            decoders: parts that may read an encoder's outputs, with their layers.
        """
        encoder.register_forward_pre_hook(self.before, with_kwargs=True)
        encoder.register_forward_hook(self.after, with_kwargs=True)
        for decoder, layers in decoders.items():
            if takes(decoder, "encoder_hidden_states"):
                self.encodings = Encodings()
                decoder.register_forward_pre_hook(partial(self.before_decoder, layers), with_kwargs=True)
        if not decoders and hasattr(model, "generate"):
            model.generate = PromptedGenerate(model)  # type: ignore[assignment]

    def before(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of the encoder.

        Raises:
            ValueError: a key-value cache that somebody else has filled, or a part of a prompt.
        """
        if self.router is None:
            return
        cache = kv_cache.cache_in((*args, *kwargs.values()))
        gates = None if cache is None else kv_cache.kept(cache)
        if gates is None:
            if cache is not None and kv_cache.length(cache):
                raise ValueError(
                    "a key-value cache that was not filled by this model: which expert its sequences need is "
                    "decided on their prompts, which are not in this call"
                )
            tokens = by_name(encoder, args, kwargs).get("input_ids")
            if isinstance(tokens, Tensor) and tokens.shape[1] < prompt_length():
                part = f"the first {tokens.shape[1]} of the {prompt_length()} tokens of a prompt"
                raise ValueError(
                    f"{part}: which expert it needs is decided on all; generate without prefill_chunk_size, "
                    "and with use_cache=False where the model has no key-value cache but a state"
                )
            gates = self.decided(self.router, self.moments(encoder, args, kwargs, self.read))
        self._decided = gates
        self.give(self.layers, gates)

    def decided(self, router: Router, moments: Sequence[Moments]) -> Tensor:
        """What layers get for samples of which the router sees this, [n, T]."""
        return router.gates(moments)

    def give(self, layers: Iterable[MingleLinear], gates: Tensor | None) -> None:
        """Let layers have these gates; None lets them have their own."""
        for layer in layers:
            layer.given_gates = gates

    def after(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a call of the encoder."""
        gates, self._decided = self._decided, None
        if gates is None:
            return
        results = tuple(output.values()) if isinstance(output, Mapping) else output
        results = results if isinstance(results, tuple) else (results,)
        cache = kv_cache.cache_in((*args, *kwargs.values(), *results))
        if cache is not None:
            kv_cache.keep(cache, gates)
        if self.encodings is not None:
            self.encodings.note(results[0], gates)

    def before_decoder(
        self,
        layers: list[MingleLinear],
        decoder: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Before a call of a decoder with an encoder's outputs."""
        hidden = by_name(decoder, args, kwargs).get("encoder_hidden_states")
        if self.router is not None and self.encodings is not None and hidden is not None:
            self.give(layers, self.encodings.gates(hidden))

    @torch.no_grad()
    def moments(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], read: Sequence[int]
    ) -> list[Moments]:
        """What the base model makes of samples at some sites, over their tokens.

        Args:
            encoder, args, kwargs: a call.
            read: the numbers of the sites whose inputs are wanted, in order.
        """
        seen: list[Moments] = []
        first = self.layers[0]
        mask = first.token_mask
        samples = _samples(by_name(encoder, args, kwargs), mask)

        def note(site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden: Tensor = by_name(site, args, kwargs)[first_name(site)]
            # some have no tokens, or rows of them; and some have the tokens of all samples in one dimension
            joined = hidden.dim() == 2 and samples and len(hidden) % samples == 0
            hidden = hidden.reshape(samples if joined else len(hidden), -1, hidden.shape[-1])
            seen.append(_moments(hidden, prompt_tokens(hidden, first.counted(hidden))))

        *earlier, last = (self.sites[number] for number in read)
        handles = [site.register_forward_pre_hook(note, with_kwargs=True) for site in earlier]
        self.give(self.layers, first.weight.new_zeros(first.num_experts) if first.num_experts else None)
        args, kwargs = _apart(encoder, args, kwargs, mask)
        try:
            with aside(), torch.autocast(first.weight.device.type, enabled=False):
                run_until([last], partial(encoder.forward, *args, **kwargs), note)
        finally:
            self.give(self.layers, None)
            for handle in handles:
                handle.remove()
        return seen


class PromptedGenerate:
    """A model's ``generate`` that lets its router know which of its tokens are the prompt.

    It stands in the model's place for the method of its class, and is copied and pickled with the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = ("inputs", "input_ids", "inputs_embeds")
        given = [*args[:1], *map(kwargs.get, names)]
        lengths = [part.shape[1] for part in given if isinstance(part, Tensor) and part.dim() > 1]
        kind: Any = type(self.model)
        with prompt(max(lengths, default=1)):  # without any prompt there is a token to begin with
            return kind.generate(self.model, *args, **kwargs)


def _apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for a pass beside the one that they are meant for: it touches no cache.

    Tokens are at the positions that they have in their samples, wherever the padding is.

    Args:
        module: a decoder; for anything else its arguments are returned as they are.
        args, kwargs: its arguments.
        mask: which tokens count, bool [n, N]; None where all do.
    """
    if not (takes(module, "use_cache") and takes(module, "input_ids")):
        return args, kwargs
    given = {
        name: value
        for name, value in by_name(module, args, kwargs).items()
        if kv_cache.cache_in([value]) is None
    }
    given["use_cache"] = False
    if mask is not None:
        given["attention_mask"] = mask.long()
        if takes(module, "position_ids") and given.get("position_ids") is None:
            given["position_ids"] = positions(mask)
    return (), given


def _samples(given: Mapping[str, Any], mask: Tensor | None) -> int:
    """How many samples are in a call with these arguments; 0 where that cannot be seen."""
    named = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    candidates = (mask, *named, *given.values())
    return next((len(one) for one in candidates if isinstance(one, Tensor) and one.dim()), 0)


def _moments(hidden: Tensor, mask: Tensor | None) -> Moments:
    """Those of hidden states [n, N, d] over the tokens in `mask` [n, N]."""
    weight = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
    weight = (weight / weight.sum(1, keepdim=True)).unsqueeze(2)
    mean = (weight * hidden).sum(1)
    return Moments(mean, (weight * (hidden - mean.unsqueeze(1)).square()).sum(1).sqrt())
