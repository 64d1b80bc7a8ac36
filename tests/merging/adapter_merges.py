"""Small merges whose experts are exported as PEFT adapters, and what is looked at in them."""

from __future__ import annotations

import copy

import pytest
import torch
from small_merges import SETTINGS, add

import mingle
from mingle.nn.matrices import oriented
from mingle.tasks.clip import ClipTask

peft = pytest.importorskip("peft")

ROUTED = {"rank": 4, "depths": (0, 1)}
GATED = {
    "mingle": SETTINGS,
    "mingle-light": SETTINGS | {"reduce": "token"},
    "mingle-routed": SETTINGS,
    "mingle-seq": SETTINGS | {"start": "previous"},
    "mass": {"rank": 4},
    "routed": ROUTED,
}
WHOLE = {"README.md", "router.json", "router.safetensors"}


def merger_of(base, method, tuned, samples, count=2, **options):
    merger = mingle.Merger(base, method, **(GATED.get(method, {}) | options))
    for i in range(count):
        add(merger, i, tuned, samples)
    return merger


def answers(model, samples):
    with torch.no_grad():
        return ClipTask().logits(model, samples[0])


def with_expert(merger, index):
    """The base with one expert added to its weights."""
    model = copy.deepcopy(merger.base)
    tower = model.get_submodule(merger.task.tower(model))
    for name, layer in merger.method.layers.items():
        linear = tower.get_submodule(name)
        linear.weight.data += oriented(layer.B[index] @ layer.A[index], linear)
    return model


def everything(merger):
    kept = {
        f"{i}/{k}": v for i in range(len(merger.merged)) for k, v in merger.method.task_tensors(i).items()
    }
    return kept | merger.method.state_tensors() | merger.model.state_dict()
