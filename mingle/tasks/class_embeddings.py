"""Embeddings of class names, which stand in for a classifier's head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mingle.tasks.base import TaskType
from mingle.tasks.data import TaskData
from mingle.tasks.heads import Head

#: their name among what samples share
EMBEDDINGS = "text_embeds"


class ClassEmbeddingTask(TaskType):
    """A task type whose classes are embeddings [C, P] that samples are compared with."""

    shared = (EMBEDDINGS,)
    one_scale = True

    def check_head(self, head: Head) -> None:
        embeddings = head.shared.get(EMBEDDINGS)
        if embeddings is None:
            return
        if embeddings.dim() != 2:
            raise ValueError(f"{EMBEDDINGS} {list(embeddings.shape)}: expected [C, P]")
        check_class_embeddings(embeddings, [f"class {row}" for row in range(len(embeddings))])
        if head.labels is not None and len(head.labels) != len(embeddings):
            raise ValueError(f"class_names: {len(head.labels)} names for {len(embeddings)} classes")

    def union(self, model: nn.Module, data: TaskData, heads: Sequence[Head]) -> list[Tensor]:
        """The scores of the classes of every task, [n, C] for each head, from one product."""
        embeddings = [head.shared[EMBEDDINGS] for head in heads]
        scores = self.logits(model, replace(data, shared={EMBEDDINGS: torch.cat(embeddings)}))
        return list(scores.split([len(part) for part in embeddings], 1))


def check_class_embeddings(head: Tensor, names: Sequence[str]) -> None:
    """Raise `ValueError` for class embeddings [C, P] that are not finite, or equal in two rows."""
    broken = (~head.isfinite()).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"text_embeds of {names[broken[0]]}: not finite")
    _, group, counts = torch.unique(head.float(), dim=0, return_inverse=True, return_counts=True)
    if (counts > 1).any():
        equal = (group == counts.argmax()).nonzero().flatten().tolist()
        raise ValueError(
            f"text_embeds of {names[equal[0]]} and {names[equal[1]]} are equal: nothing could tell these "
            f"classes apart ({len(equal)} of {len(head)} are the same)"
        )


def check_labels(data: TaskData, classes: int) -> None:
    """Raise `ValueError` for labels that are not one per sample, or not among as many classes."""
    if data.labels is None:
        return
    if data.labels.shape != (len(data),):
        raise ValueError(f"labels {list(data.labels.shape)}: expected [{len(data)}], one per sample")
    wrong = ((data.labels < 0) | (data.labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        label = data.labels[wrong[0]].item()
        raise ValueError(f"labels: {label} at row {wrong[0]}, and there are {classes} classes")
