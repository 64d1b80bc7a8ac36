"""How likely a causal language model holds given answers to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mingle.nn.call_arguments import takes
from mingle.nn.kv_cache import cache_in
from mingle.tasks.base import TaskType
from mingle.tasks.data import TaskData
from mingle.tasks.prompts import left_padded, positions
from mingle.tasks.vocabulary import output_embeddings

#: the largest size, in bytes, of logits that are made at a time, where one sample's are not larger
_BUDGET = 2**26
_BATCH = 16  # samples in one pass that makes no logits


def answer_likelihoods(task: TaskType, model: nn.Module, data: TaskData) -> Tensor:
    """For each sample the log-likelihood of its answer in nats, and its number of tokens, float64 [n, 2].

    Args:
        task: says which positions are those before an answer's tokens, see `TaskType.valid`.
        model: the model.
        data: with ``input_ids`` [n, S].
    """
    vocabulary, parts = task.vocabulary(model, data), []
    for batch in data.batches(1 if vocabulary is None else _BATCH):
        valid, wanted = task.valid(batch), batch.inputs["input_ids"][:, 1:]
        assert valid is not None
        if vocabulary is None:
            values = _picked(task.logits(model, batch)[valid], wanted[valid])
        else:
            states, size = task.states(model, vocabulary, batch)[valid], _rows(vocabulary.size)
            pieces = zip(states.split(size), wanted[valid].split(size), strict=True)
            values = torch.cat([_picked(vocabulary.logits(hidden), tokens) for hidden, tokens in pieces])
        totals = values.cpu().new_zeros(len(batch))
        totals.index_add_(0, valid.nonzero()[:, 0].cpu(), values.cpu())
        parts.append(torch.stack([totals, valid.sum(1).cpu().double()], 1))
    return torch.cat(parts)


def choice_likelihoods(task: TaskType, model: nn.Module, data: TaskData) -> tuple[Tensor, Tensor]:
    """Log-likelihoods in nats of the answers to choose from, and their numbers of tokens, float64 [n, K].

    Each prompt passes through the model once, and its choices start from the key-value cache; or they pass
    with it, where the cache of this model cannot be repeated.

    Args:
        task: as for `answer_likelihoods`.
        model: the model.
        data: with ``input_ids``, ``attention_mask`` [n, S] and ``choices`` [n, K, C], filled up with −100.
    """
    lm: Any = model
    (n, count, length), size = data.inputs["choices"].shape, len(output_embeddings(lm).weight)
    parts = []
    for batch in data.batches(max(1, _rows(size) // (count * length))):
        found = _from_cache(lm, batch)
        parts.append(answer_likelihoods(task, model, _spelled_out(batch)) if found is None else found)
    sums, lengths = torch.cat(parts).view(n, count, 2).unbind(2)
    return sums, lengths


def _from_cache(lm: Any, data: TaskData) -> Tensor | None:
    """What `answer_likelihoods` gives for all choices in order, [n · K, 2]; None for other kinds of cache."""
    device = lm.device
    ids, mask = left_padded(data.inputs["input_ids"].to(device), data.inputs["attention_mask"].to(device))
    prompts = lm(**_inputs(lm, ids, mask, mask), use_cache=True)
    name, cache = next((key, value) for key, value in prompts.items() if cache_in([value]) is not None)
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [None])):
        return None
    choices = data.inputs["choices"].to(device)
    count, choices = choices.shape[1], choices.flatten(0, 1)
    counted, tokens = choices >= 0, choices.clamp_min(0)
    whole = torch.cat([mask.repeat_interleave(count, 0), counted.to(mask)], 1)
    last = prompts.logits[:, -1:].repeat_interleave(count, 0)
    cache.batch_repeat_interleave(count)
    rest = lm(**_inputs(lm, tokens, whole, counted), **{name: cache}).logits[:, :-1]
    likelihoods = torch.where(counted, _picked(torch.cat([last, rest], 1), tokens), 0)
    return torch.stack([likelihoods.sum(1), counted.sum(1).double()], 1).cpu()


def _spelled_out(data: TaskData) -> TaskData:
    """Every prompt once with each of its choices."""
    ids, mask = left_padded(data.inputs["input_ids"], data.inputs["attention_mask"])
    count, choices = data.inputs["choices"].shape[1], data.inputs["choices"].flatten(0, 1)
    ids, mask, counted = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0), choices >= 0
    return TaskData(
        {
            "input_ids": torch.cat([ids, choices.clamp_min(0)], 1),
            "attention_mask": torch.cat([mask, counted.to(mask)], 1),
            "answer_mask": torch.cat([torch.zeros_like(mask), counted.to(mask)], 1),
        }
    )


def _inputs(lm: Any, ids: Tensor, whole: Tensor, own: Tensor) -> dict[str, Any]:
    """The arguments of a call with tokens [n, N] after others, where `whole` [n, M + N] masks all of them."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": whole}
    if takes(lm, "position_ids"):
        given["position_ids"] = positions(whole)[:, -own.shape[1] :]
    if takes(lm, "logits_to_keep") and own is whole:
        given["logits_to_keep"] = 1  # of a prompt only the last are looked at
    return given


def _rows(size: int) -> int:
    """How many positions have their logits made at a time, with `size` for each."""
    return max(1, _BUDGET // (4 * size))


def _picked(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens [...] under logits [..., V], float64 [...]."""
    logits = logits.float()
    own = logits.gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1)
    return own.double() - logits.logsumexp(-1).double()
