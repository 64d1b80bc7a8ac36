"""Text to text with T5, BART and their kind: the whole model is merged, and answers are generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mingle.tasks.base import TaskType, required_labels
from mingle.tasks.classification import auto_class
from mingle.tasks.data import TaskData
from mingle.tasks.masks import answer_mask
from mingle.tasks.prompts import endings, right_padded, start
from mingle.tasks.shares import of_all, own_batches
from mingle.tasks.structure import Structure
from mingle.tasks.vocabulary import Vocabulary, find_vocabulary

#: tokens of an answer, the start token included, as published
ANSWER_TOKENS = 10
_GLIMPSE = 3  # tokens of an answer that a head is looked at with
_BATCH = 128  # samples in one pass that generates


class Seq2SeqTask(TaskType):
    """The task type ``seq2seq``, also called ``t5``: any model of a class ``AutoModelForSeq2SeqLM``.

    Samples are mappings with ``input_ids`` and ``attention_mask`` [n, S], and for evaluation ``labels``
    [n, L], the tokens of the answers followed by pad tokens.  Adaptation compares models along the fine-tuned
    model's own answers, which `prepared` adds as ``decoder_input_ids`` and ``decoder_attention_mask`` [n, L].

    Padding takes part in nothing: neither in the means that gates see, nor in input directions, nor in
    losses.  Layers that see the decoder's tokens have ``token`` gates whatever is asked for: the mean over an
    answer would see tokens that are still to come, and with a key-value cache it would see a single token.
    """

    name = "seq2seq"
    one_class = False  # but a text
    modality = "text"
    #: attention and the inner feed-forward layers of T5, gated as in Flan-T5 or not
    published_sets: ClassVar = {
        "full": (
            *(f"{kind}.{part}" for kind in ("SelfAttention", "EncDecAttention") for part in "qkvo"),
            *(f"DenseReluDense.{layer}" for layer in ("wi_0", "wi_1", "wi")),
        )
    }

    def model_class(self, config: Mapping[str, Any]) -> type[Any]:
        return auto_class("AutoModelForSeq2SeqLM", config, "an encoder and a decoder")

    def data(self, given: TaskData | Mapping[str, Any]) -> TaskData:
        """Samples as `TaskData`.

        Raises:
            ValueError: a missing key, or shapes that do not fit; the message names the key.
        """
        if not isinstance(given, TaskData):
            for key in ("input_ids", "attention_mask"):
                if key not in given:
                    raise ValueError(
                        f"the samples of a {self.name} task need {key!r}; got {', '.join(given)}"
                    )
            given = TaskData(
                {key: given[key] for key in ("input_ids", "attention_mask")}, {}, given.get("labels")
            )
        first = given.select(slice(0, 1)).inputs
        ids, mask = first["input_ids"], first["attention_mask"]
        if ids.dim() != 2 or mask.shape != ids.shape:
            raise ValueError(
                f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)}: expected [n, S] for both"
            )
        if given.labels is not None and (given.labels.dim() != 2 or len(given.labels) != len(given)):
            expected = f"the tokens of {len(given)} answers, [{len(given)}, L]"
            raise ValueError(f"labels {list(given.labels.shape)}: expected {expected}")
        return given

    def reduce_for(self, structure: Structure, layer: str, reduce: str) -> str:
        """``token`` for layers that see the decoder's tokens."""
        return reduce if structure.sees_first(layer) else "token"

    @torch.no_grad()
    def prepared(self, teacher: Callable[[], nn.Module], seeds: TaskData) -> TaskData:
        """The seed samples with the fine-tuned model's greedy answers as the decoder's inputs.

        Each of several processes has it answer some of them.
        """
        model: Any = teacher()
        seeds = seeds.to(model.device)
        answers = of_all([self._answers(model, batch).cpu() for batch in own_batches(model, seeds, _BATCH)])
        ends, pad = endings(model)
        given = torch.cat(_padded(answers, pad))[:, :-1].to(model.device)
        # Nothing is predicted from the end of an answer on.  The first token starts it, which in BART is the
        # one that ends it.
        ended = F.pad(torch.isin(given[:, 1:], given.new_tensor(ends)).cumsum(1) > 0, (1, 0))
        return replace(
            seeds,
            inputs={**seeds.inputs, "decoder_input_ids": given, "decoder_attention_mask": (~ended).long()},
            labels=None,
        )

    def logits(self, model: nn.Module, data: TaskData) -> Tensor:
        """Scores of the vocabulary for every position of the decoder's inputs, [n, L, V].

        Without such inputs the decoder sees the start token alone, and L is 1.
        """
        t5: Any = model
        inputs = {name: tensor.to(t5.device) for name, tensor in data.inputs.items()}
        ids, mask = right_padded(inputs["input_ids"], inputs["attention_mask"])
        decoder_ids = inputs.get("decoder_input_ids")
        if decoder_ids is None:
            decoder_ids = inputs["input_ids"].new_full((len(data), 1), start(t5))
        with answer_mask(_counted(inputs)):
            result: Tensor = t5(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=decoder_ids,
                use_cache=False,
            ).logits
        return result

    def vocabulary(self, model: nn.Module, data: TaskData) -> Vocabulary | None:
        few = {
            name: tensor[:1, :_GLIMPSE] if name.startswith("decoder") else tensor[:1]
            for name, tensor in data.inputs.items()
        }
        return find_vocabulary(model, lambda: self.logits(model, TaskData(few)))

    def valid(self, data: TaskData) -> Tensor | None:
        """Positions up to the end of the answer, bool [n, L]; None without the decoder's inputs."""
        return _counted(data.inputs)

    def outcomes(self, model: nn.Module, data: TaskData) -> Tensor:
        """Whether the generated tokens are those of the answer, [n]; for ``spearman`` both as numbers [n, 2].

        Text that is not a finite number counts as 0.
        """
        labels, (ends, pad) = required_labels(data), endings(model)
        answers = _padded([self._answers(model, data)[:, 1:].cpu(), labels.cpu()], pad)
        given, wanted = (
            tokens.where(torch.isin(tokens, tokens.new_tensor(ends)).cumsum(1) == 0, pad)
            for tokens in answers
        )
        if data.metric != "spearman":
            return (given == wanted).all(1).double()
        if data.decode is None:
            raise ValueError("answers that are numbers need `decode`, which turns tokens into text")
        return torch.tensor(
            [[_number(text) for text in data.decode(tokens)] for tokens in (given, wanted)],
            dtype=torch.float64,
        ).mT

    @torch.no_grad()
    def written(self, model: nn.Module, data: TaskData, length: int) -> Tensor:
        return self._answers(model, data, length + 1)[0, 1:]

    def _answers(self, model: nn.Module, data: TaskData, length: int = ANSWER_TOKENS) -> Tensor:
        """Greedy answers [n, ≤ length], the start token first."""
        t5: Any = model
        ids, mask = (data.inputs[name].to(t5.device) for name in ("input_ids", "attention_mask"))
        ids, mask = right_padded(ids, mask)
        answers: Tensor = t5.generate(
            input_ids=ids, attention_mask=mask, max_length=length, do_sample=False, num_beams=1
        )
        return answers


def _counted(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("decoder_attention_mask")
    return None if mask is None else mask.bool()


def _padded(parts: list[Tensor], pad: int) -> list[Tensor]:
    """Token tensors [n_i, L_i], padded to one length."""
    length = max(part.shape[1] for part in parts)
    return [F.pad(part, (0, length - part.shape[1]), value=pad) for part in parts]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if abs(value) < float("inf") else 0.0
