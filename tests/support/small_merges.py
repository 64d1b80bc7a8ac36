"""Small merges that several test files make."""

from __future__ import annotations

import torch

import mingle
from mingle.tasks import TaskData

SETTINGS = dict(rank=4, steps=3, lr=5e-3, batch_size=8)
NAMES = ["one", "two", "three"]


def add(merger, i, tuned, samples):
    seeds = TaskData(samples[i].inputs, samples[i].shared)
    return merger.add(NAMES[i], tuned[i], seeds)


def merge(base_model, tuned, samples, count=3, method="mingle", **options):
    merger = mingle.Merger(base_model, method, **(SETTINGS | options))
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def everything(merger):
    return {f"model/{k}": v for k, v in merger.model.state_dict().items()} | {
        f"basis/{k}": v for k, v in merger.method.bases.items()
    }


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
