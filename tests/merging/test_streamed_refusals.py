"""What merges from files refuse, in the words of merges in memory."""

from __future__ import annotations

import pytest
import torch
from streamed_merges import edited, from_files
from tiny_merge import contents

import mingle
from mingle.io.files import CheckpointError
from mingle.io.state_dicts import IncompatibleModel
from mingle.merging.finite import NonFiniteMerge
from mingle.merging.streamed import StreamedMerger

NORM = "model.layers.1.input_layernorm.weight"


FAULTS = {
    "missing": lambda tensors: tensors.pop(NORM),
    "extra": lambda tensors: tensors.update({"model.layers.7.x.weight": torch.ones(2)}),
    "shape": lambda tensors: tensors.update({NORM: torch.ones(3)}),
    "not finite": lambda tensors: tensors[NORM].__setitem__(1, float("nan")),
    "integers": lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int8)}),
    "untied": lambda tensors: tensors.update({"lm_head.weight": torch.ones(40, 16)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_fine_tuned_model_are_refused_in_the_same_words(mixtral, fault, tmp_path):
    broken = edited(mixtral / "two", tmp_path / "broken", FAULTS[fault])
    out = tmp_path / "merged"
    merger = from_files(mixtral, "average", out, ["one"])
    before, memory = contents(out), mingle.Merger(mixtral / "base", "average")
    memory.add("one", mixtral / "one")
    said = []
    for add in (lambda: memory.add("two", broken), lambda: merger.add("two", broken, out)):
        with pytest.raises((IncompatibleModel, CheckpointError)) as refusal:
            add()
        said.append((type(refusal.value), str(refusal.value)))
    assert said[0] == said[1] and said[0][1].startswith("task 'two': ")
    assert contents(out) == before
    merger.add("two", mixtral / "two", out)  # which is as it was before
    assert mingle.Merger.from_pretrained(out).task_names == ["one", "two"]


def test_results_that_are_not_finite_are_refused_in_the_same_words(mixtral, tmp_path):
    options = {"scaling": 1e38}
    memory = mingle.Merger(mixtral / "base", "task-arithmetic", **options)
    merger = StreamedMerger(mixtral / "base", "task-arithmetic", **options)
    huge = edited(mixtral / "one", tmp_path / "huge", lambda t: t[NORM].fill_(1e6))
    said = []
    for add in (lambda: memory.add("one", huge), lambda: merger.add("one", huge, tmp_path / "merged")):
        with pytest.raises(NonFiniteMerge) as refusal:
            add()
        said.append(str(refusal.value))
    assert said[0] == said[1] and NORM in said[0]
    assert not (tmp_path / "merged/manifest.json").exists()


def test_names_that_are_taken_and_methods_that_need_a_model_are_refused(mixtral, tmp_path):
    merger = from_files(mixtral, "average", tmp_path, ["one"])
    with pytest.raises(ValueError, match="task 'one' is already merged"):
        merger.add("one", mixtral / "two", tmp_path)
    with pytest.raises(ValueError, match="method 'routed' cannot merge this base tensor by tensor"):
        StreamedMerger(mixtral / "base", "routed")
