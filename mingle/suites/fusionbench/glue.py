"""GLUE as text to text: prompts and answers of `fusion_bench`, tokenised batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from mingle.io.hub import Revisions
from mingle.suites.fusionbench import prompts
from mingle.suites.fusionbench.datasets import GLUE_TASKS
from mingle.suites.fusionbench.layout import DatasetError
from mingle.suites.fusionbench.loading import Split
from mingle.suites.protocol import Labels
from mingle.tasks import TaskData
from mingle.tasks.lazy import LazyInputs
from mingle.tasks.seq2seq import Seq2SeqTask
from mingle.tasks.tokenizer import text_tokenizer

#: seed samples of a task, as published
SEEDS = 100
#: longer prompts are cut, as published
MAX_TOKENS = 512


class GlueSamples:
    """The validation samples of a GLUE task, whose test labels are not public.

    Args:
        name: the task's name.
        base: finds the folder of the base model, whose tokenizer prepares the samples.
        revisions: the commits to keep to, see `mingle.io.hub`.
    """

    def __init__(self, name: str, base: Callable[[], Path], revisions: Revisions) -> None:
        self.name, self.base, self.revisions = name, base, revisions

    @cached_property
    def split(self) -> Split:
        return Split(GLUE_TASKS[self.name], self.revisions)

    @cached_property
    def answers(self) -> list[str]:
        """The right answer to each sample."""
        form = prompts.glue(self.name)["target_text"]
        answers = []
        for row, label in enumerate(self.split.labels()):
            if isinstance(form, str) and isinstance(label, int | float):
                answers.append(form.format(label))
            elif isinstance(form, dict) and str(label) in form:
                answers.append(form[str(label)])
            else:
                known = f"one of {', '.join(form)}" if isinstance(form, dict) else "a number"
                raise DatasetError(
                    f"{self.split.source}: row {row} has {self.split.label} {label!r}, expected {known}"
                )
        return answers

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, which has an embedding for each of its tokens."""
        folder = self.base()
        model: Any = Seq2SeqTask().skeleton(folder)
        return text_tokenizer(folder, model.config.vocab_size)

    def counted(self) -> Labels:
        """A row for each sample: the answers are not classes."""
        return Labels(torch.arange(len(self.split)))

    def check(self) -> None:
        """Check the data set, except for the texts of the prompts, and the tokenizer."""
        _ = self.answers, self.tokenizer

    def __call__(self) -> TaskData:
        """The samples, with prompts that are yet to be tokenised.

        Labels are the tokens of the answers, int64 [n, L], followed by pad tokens.
        """
        answers, tokenizer = self.answers, self.tokenizer
        labels = tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
        inputs = LazyInputs(
            ("input_ids", "attention_mask"),
            _Prompts(self.name, self.split, tokenizer),
            torch.arange(len(answers)),
        )
        metric = "spearman" if isinstance(prompts.glue(self.name)["target_text"], str) else "accuracy"
        return TaskData(
            inputs, {}, labels, metric, decode=partial(tokenizer.batch_decode, skip_special_tokens=True)
        )


class _Prompts:
    """Rows of the split as token numbers, padded to the longest prompt of a batch."""

    def __init__(self, name: str, split: Split, tokenizer: Any) -> None:
        self.form, self.split, self.tokenizer = prompts.glue(name)["input_text"], split, tokenizer

    def __call__(self, rows: list[int]) -> Mapping[str, torch.Tensor]:
        samples = self.split.rows(rows)
        for row, sample in zip(rows, samples, strict=True):
            for column, text in sample.items():
                if not isinstance(text, str):
                    raise DatasetError(
                        f"{self.split.source}: {self.split.place(row)} has no text in the column {column!r}"
                    )
        texts = [self.form.format(**sample) for sample in samples]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}
