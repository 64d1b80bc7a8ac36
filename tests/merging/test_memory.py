"""What a merge in memory holds there, and what it gives back."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest
import torch
from small_merges import NAMES, merge

from mingle import heap
from mingle.io.journal import PartFiles
from mingle.merging.merger import Merger
from mingle.tasks import TaskData


def test_older_experts_are_in_memory_once_while_gates_adapt(base_model, tuned_states, samples, monkeypatch):
    merger = merge(base_model, tuned_states, samples, count=1)
    older = [weakref.ref(layer.A) for layer in merger.method.layers.values()]
    assert all(stack() is not None for stack in older)
    alive = []

    def note(*_):
        alive.append(sum(stack() is not None for stack in older))

    def teacher(self, *arguments, real=Merger.teacher):
        note()
        return real(self, *arguments)

    monkeypatch.setattr(Merger, "teacher", teacher)
    merger.add(NAMES[1], tuned_states[1], TaskData(samples[1].inputs, samples[1].shared), note)
    assert len(alive) > 2 and set(alive) == {0}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_was_freed_between_tensors_in_use_is_given_back():
    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    count, entries = 2000, 12_500  # of 50 kB, too small for memory of their own
    tensors = [torch.ones(entries) for _ in range(count)]
    kept = tensors[::2]
    del tensors
    before = resident()
    heap.trim()
    assert before - resident() > 0.7 * 4 * entries * (count - len(kept))


@pytest.mark.parametrize("method", ["mingle", "mingle-routed"])
def test_a_merge_that_is_loaded_has_one_read_tensor_beside_those_of_its_layers(
    method, base_model, tuned_states, samples, tmp_path, monkeypatch
):
    merger = merge(base_model, tuned_states, samples, count=3, method=method)
    merger.save_pretrained(tmp_path)
    read, alive = [], []

    def rows(self, name, rows, real=PartFiles.rows):
        alive.append(sum(tensor() is not None for tensor in read))
        tensor = real(self, name, rows)
        if name.endswith((".A", ".B")):
            read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(PartFiles, "rows", rows)
    loaded = Merger.from_pretrained(tmp_path)
    layers = loaded.method.layers
    assert len(read) == 2 * 3 * len(layers) and max(alive) <= 2
    for name, layer in layers.items():
        assert torch.equal(layer.A, merger.method.layers[name].A)
