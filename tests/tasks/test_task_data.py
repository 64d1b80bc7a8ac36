"""Samples: inputs that are made when they are asked for, and batches of texts of one length."""

from __future__ import annotations

import torch

from mingle.tasks import TaskData
from mingle.tasks.lazy import LazyInputs


def test_lazy_inputs_are_a_mapping():
    lazy = LazyInputs(
        ("a", "b"), lambda rows: {"a": torch.tensor(rows), "b": -torch.tensor(rows)}, torch.arange(9)
    )
    data = TaskData(lazy, {}, torch.arange(9) * 10, metric="spearman").select(torch.tensor([8, 2, 5]))
    assert len(data) == 3 and list(data.inputs) == ["a", "b"] and len(data.inputs) == 2
    assert data.inputs["b"].tolist() == [-8, -2, -5]
    moved = data.to(torch.device("cpu"))
    assert (moved.inputs["a"].tolist(), moved.labels.tolist(), moved.metric) == (
        [8, 2, 5],
        [80, 20, 50],
        "spearman",
    )
    assert [batch.inputs["a"].tolist() for batch in data.batches(2)] == [[8, 2], [5]]


def _texts(lengths: list[int], width: int) -> TaskData:
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
    ids = torch.arange(len(lengths)).unsqueeze(1) * 100 + torch.arange(1, width + 1)
    return TaskData({"input_ids": ids * mask, "attention_mask": mask}, {}, torch.arange(len(lengths)))


def test_batches_by_length_hold_every_text_whole_and_little_padding():
    lengths = [3, 9, 1, 9, 2, 0, 5]
    data = _texts(lengths, width=12)
    batches = list(data.batches_by_length(3))
    assert [batch.inputs["input_ids"].shape for batch in batches] == [(3, 2), (3, 9), (1, 9)]
    found = {
        int(label): row[row > 0].tolist()
        for batch in batches
        for label, row in zip(batch.labels, batch.inputs["input_ids"], strict=True)
    }
    assert found == {n: [100 * n + i + 1 for i in range(length)] for n, length in enumerate(lengths)}


def test_padding_on_the_left_stays_as_positions_count_from_there():
    data = _texts([1, 3], width=4)
    flipped = TaskData({name: tensor.flip(1) for name, tensor in data.inputs.items()}, {}, data.labels)
    (batch,) = flipped.batches_by_length(2)
    assert batch.inputs["attention_mask"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_a_batch_without_any_token_keeps_a_column():
    (batch,) = _texts([0, 0], width=4).batches_by_length(2)
    assert batch.inputs["input_ids"].shape == (2, 1)


def test_what_is_not_text_or_has_labels_for_each_token_comes_in_order():
    images = TaskData({"pixel_values": torch.arange(5.0)}, {}, torch.arange(5))
    assert [batch.labels.tolist() for batch in images.batches_by_length(2)] == [[0, 1], [2, 3], [4]]
    texts = _texts([3, 1], width=4)
    tagged = TaskData(texts.inputs, {}, torch.zeros(2, 4))
    (batch,) = tagged.batches_by_length(2)
    assert batch.inputs["input_ids"].shape == (2, 4)
