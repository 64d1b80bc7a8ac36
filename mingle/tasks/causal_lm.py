"""Causal language models: answers follow their prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.nn.call_arguments import takes
from mingle.options import nearest, shown
from mingle.tasks.base import TaskType, required_labels
from mingle.tasks.classification import auto_class, check_tokens, with_mask
from mingle.tasks.data import TaskData
from mingle.tasks.likelihood import answer_likelihoods, choice_likelihoods
from mingle.tasks.masks import prompt
from mingle.tasks.prompts import endings, left_padded, positions
from mingle.tasks.shares import of_all, own_batches
from mingle.tasks.structure import Structure
from mingle.tasks.vocabulary import Vocabulary, find_vocabulary

#: the most tokens of an answer that is generated
ANSWER_TOKENS = 32
_GLIMPSE = 4  # tokens that a head is looked at with
_BATCH = 32  # samples in one pass that generates
#: what can be measured
METRICS = ("accuracy", "accuracy-per-token", "perplexity")
#: in the place of a token where there is none
_NONE = -100


class CausalLmTask(TaskType):
    """The task type ``causal-lm``: any model of a class ``AutoModelForCausalLM``.

    Samples are mappings with ``input_ids`` and ``attention_mask`` [n, S], padded on either side: prompts, or
    prompts with answers where ``answer_mask`` [n, S] marks the tokens of the answers.

    What is measured depends on what else there is, and on ``metric``:

    - ``labels`` [n, L], the tokens of answers to prompts, followed by pad tokens: how many greedy answers are
      exactly these;
    - ``choices`` [n, K, C], the tokens of K answers to each prompt, filled up with −100, and ``labels`` [n],
      the right ones: for how many prompts it is the likeliest.  Sums of log-likelihoods are compared, or,
      with ``metric="accuracy-per-token"``, their means over an answer's tokens, which do not favour short
      answers;
    - ``metric="perplexity"``: how likely the tokens marked by ``answer_mask`` are, or all but the first; see
      `mingle.merging.evaluate.score`.

    Adaptation compares models at the tokens of the given answers, or else along the fine-tuned model's own
    greedy answers, which `prepared` adds.  All gates are ``token`` gates, or given by a router: the mean over
    a sample would see tokens that are still to come.
    """

    name = "causal-lm"
    one_class = False  # but a text
    modality = "text"

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples as `TaskData`.

        Raises:
            ValueError: a missing key, or shapes that do not fit; the message names the key.
        """
        given = with_mask(given)
        if not isinstance(given, TaskData):
            if "input_ids" not in given:
                found = ", ".join(given) or "nothing"
                raise ValueError(f"the samples of a {self.name} task need 'input_ids'; got {found}")
            names = ("input_ids", "attention_mask", "answer_mask", "choices")
            inputs = {key: given[key] for key in names if key in given}
            given = TaskData(inputs, {}, given.get("labels"), given.get("metric", "accuracy"))
        if given.metric not in METRICS:
            closest, expected = nearest(str(given.metric), METRICS), ", ".join(METRICS)
            raise ValueError(f"metric={shown(given.metric)}{closest}: expected one of {expected}")
        first = given.select(slice(0, 1)).inputs
        check_tokens(first)
        if "answer_mask" in first and first["answer_mask"].shape != first["input_ids"].shape:
            found = f"{list(first['answer_mask'].shape)} and input_ids {list(first['input_ids'].shape)}"
            raise ValueError(f"answer_mask {found}: expected [n, S] for both")
        if given.labels is not None and len(given.labels) != len(given):
            raise ValueError(f"labels {list(given.labels.shape)}: expected one row for each of {len(given)}")
        _check_choices(given)
        return given

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        return auto_class("AutoModelForCausalLM", config, "a head for a vocabulary")

    def reduce_for(self, structure: Structure, layer: str, reduce: str) -> str:
        """``token`` in all layers."""
        return "token"

    @torch.no_grad()
    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """The seed samples with answers: their own, or else the fine-tuned model's greedy ones.

        Each of several processes has it answer some of them.
        """
        if "answer_mask" in seeds.inputs:
            return seeds
        model: Any = teacher()
        seeds = seeds.to(model.device)
        own = [self._answered(model, batch) for batch in own_batches(model, seeds, _BATCH)]
        parts = of_all([tuple(part.cpu() for part in answered) for answered in own])
        length = max(ids.shape[1] for ids, _, _ in parts)
        joined = [
            torch.cat([F.pad(part, (0, length - part.shape[1])) for part in kind]).to(model.device)
            for kind in zip(*parts, strict=True)
        ]
        names = ("input_ids", "attention_mask", "answer_mask")
        return replace(seeds, inputs=dict(zip(names, joined, strict=True)), labels=None)

    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """Scores of the vocabulary after every token but the last, [n, S − 1, V]; see `valid`."""
        lm: Any = model
        ids, mask = (data.inputs[name].to(lm.device) for name in ("input_ids", "attention_mask"))
        given = {"position_ids": positions(mask)} if takes(lm, "position_ids") else {}
        answers = data.inputs.get("answer_mask")
        with prompt(None if answers is None else answers.cumsum(1) == 0):
            result: Tensor = lm(input_ids=ids, attention_mask=mask, use_cache=False, **given).logits
        return result[:, :-1]

    def vocabulary(self, model: nn.Module, data: TaskData) -> Vocabulary | None:
        row = data.inputs["attention_mask"][0].bool()
        ids = data.inputs["input_ids"][:1, row][:, :_GLIMPSE]
        few = TaskData({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        return find_vocabulary(model, lambda: self.logits(model, few))

    def states(self, model: nn.Module, vocabulary: Vocabulary, data: TaskData) -> Tensor:
        return super().states(model, vocabulary, data)[:, :-1]

    def valid(self, data: TaskData) -> Tensor | None:
        """The positions before the answers' tokens, bool [n, S − 1]; without answers, before any token."""
        counted = data.inputs.get("answer_mask", data.inputs["attention_mask"]).bool()
        return counted[:, 1:] & data.inputs["attention_mask"][:, :-1].bool()

    def outcomes(self, model: nn.Module, data: TaskData) -> Tensor:
        """Whether the answers are right, [n]; for ``perplexity`` how likely they are, [n, 2]."""
        if data.metric == "perplexity":
            return answer_likelihoods(self, model, data)
        if "choices" in data.inputs:
            sums, lengths = choice_likelihoods(self, model, data)
            scores = sums / lengths if data.metric == "accuracy-per-token" else sums
            return (scores.argmax(1) == required_labels(data).cpu()).double()
        return self._exact(model, data)

    @torch.no_grad()
    def written(self, model: nn.Module, data: TaskData, length: int) -> Tensor:
        ids, _, counted = self._answered(model, data, length)
        return ids[counted.bool()]

    def _exact(self, model: nn.Module, data: TaskData) -> Tensor:
        """Whether the greedy answers to the prompts are those wanted, token by token, [n]."""
        wanted, (ends, pad) = required_labels(data).cpu(), endings(model)
        ids, _, counted = (part.cpu() for part in self._answered(model, data, wanted.shape[1]))
        given = ids.where(counted.bool(), _NONE)[:, data.inputs["input_ids"].shape[1] :]
        length = max(given.shape[1], wanted.shape[1])
        cut = [
            _cut(F.pad(part, (0, length - part.shape[1]), value=_NONE), ends)
            for part in (given, wanted.where(wanted != pad, _NONE))
        ]
        return (cut[0] == cut[1]).all(1).double()

    def _answered(
        self, model: nn.Module, data: TaskData, length: int = ANSWER_TOKENS
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts, padded on the left, and greedy answers: token ids, what is not padding, what is answer.

        Each is int64 [n, S + L] with L ≤ `length`; the token that ends an answer is part of it.
        """
        lm: Any = model
        ids, mask = (data.inputs[name].to(lm.device) for name in ("input_ids", "attention_mask"))
        ids, mask = left_padded(ids, mask)
        ends, pad = endings(model)
        room = getattr(lm.config, "max_position_embeddings", None)
        if room is not None and ids.shape[1] + length > room:
            length = room - ids.shape[1]
            if length < 1:
                found = f"prompts of {ids.shape[1]} tokens"
                raise ValueError(f"{found} leave no room for answers: the model has {room} positions")
        answered: Tensor = lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        answers = answered[:, ids.shape[1] :]
        over = torch.isin(answers, torch.tensor(ends, device=answers.device)).long()
        counted = (over.cumsum(1) - over == 0).long()
        return answered, torch.cat([mask, counted], 1), torch.cat([torch.zeros_like(mask), counted], 1)


def _check_choices(data: TaskData) -> None:
    """Raise `ValueError` unless choices have one token or more each, and the labels are among them."""
    if "choices" not in data.inputs:
        if data.metric == "accuracy-per-token":
            raise ValueError(f"metric={data.metric!r} compares 'choices', and these samples have none")
        return
    choices, labels = data.inputs["choices"], data.labels
    if choices.dim() != 3 or choices.is_floating_point() or len(choices) != len(data):
        raise ValueError(f"choices {list(choices.shape)} of {choices.dtype}: expected token ids [n, K, C]")
    given = choices >= 0
    if not given[..., :1].all() or (given[..., 1:] & ~given[..., :-1]).any():
        raise ValueError("choices: expected one token or more in each, and −100 behind them")
    if labels is None:
        return
    if labels.shape != choices.shape[:1] or labels.min() < 0 or labels.max() >= choices.shape[1]:
        raise ValueError(
            f"labels {list(labels.shape)}: expected [n], which of {choices.shape[1]} choices is right"
        )


def _cut(tokens: Tensor, ends: list[int]) -> Tensor:
    """Answers [n, L] without what follows the first token that ends them, or that is none."""
    over = torch.isin(tokens, torch.tensor([*ends, _NONE])).cumsum(1) > 0
    return tokens.where(~over, _NONE)
