"""The end-to-end benchmark: that its published peer gives our gates, that a wrong one is refused, and that its accounts add up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from mingle.bench.endtoend import agreement, contenders
from mingle.bench.endtoend.cases import CASES, Problem
from mingle.bench.endtoend.clock import Stopwatch
from mingle.bench.endtoend.contenders import EAGER, OURS, PUBLISHED
from mingle.bench.peers.published import Published
from mingle.tasks import TaskData, get

CPU = torch.device("cpu")
SETTINGS = dict(rank=4, steps=6, lr=5e-3, batch_size=8, gate_init="normal")


@pytest.fixture
def problem(base_model, tuned_states, samples, tmp_path):
    return make(base_model, tuned_states, samples, tmp_path)


def make(base_model, tuned_states, samples, folder, dtype=torch.float32, **options) -> Problem:
    """The three tasks of the other tests, as a case of the benchmark."""
    base = CLIPModel(base_model.config).to(dtype).eval()
    base.load_state_dict(base_model.state_dict())
    for i, state in enumerate(tuned_states):
        (folder / str(i)).mkdir(parents=True)
        tensors = {f"vision_model.{name}": tensor.to(dtype) for name, tensor in state.items()}
        save_file(tensors, folder / str(i) / "model.safetensors", {"format": "pt"})
        (folder / str(i) / "config.json").write_text(json.dumps(base.config.vision_config.to_dict()))

    def data(i: int) -> TaskData:
        inputs, shared = ({name: tensor.to(dtype) for name, tensor in part.items()} for part in (samples[i].inputs, samples[i].shared))
        return TaskData(inputs, shared, samples[i].labels)

    case = replace(CASES["glyphs8"], name="tiny", title="tiny")
    return Problem(case, get("clip"), base, 3, SETTINGS | options, lambda i: folder / str(i), data, data)


@pytest.mark.parametrize(("dtype", "gate_init"), [(torch.float32, "normal"), (torch.float64, "zeros")])
@pytest.mark.parametrize("reduce", ["batch", "sample"])
def test_the_published_procedure_gives_our_gates(reduce, gate_init, dtype, base_model, tuned_states, samples, tmp_path):
    problem = make(base_model, tuned_states, samples, tmp_path, dtype, reduce=reduce, gate_init=gate_init)
    merges = {name: contenders.start(name, problem, Stopwatch(CPU)) for name in (OURS, EAGER, PUBLISHED)}
    for merge in merges.values():
        for i in range(problem.tasks):
            merge.add(problem.expert(i), problem.seeds(i))
    limit = {torch.float32: 1e-4, torch.float64: 1e-6}[dtype]
    for name in (EAGER, PUBLISHED):
        verdict = agreement.gates(merges[name].gates(), merges[OURS].gates())
        assert verdict["ok"] and verdict["error"] < limit and verdict["tolerance"] == limit, verdict
        assert agreement.bases(merges[name].bases(), merges[OURS].bases())["ok"]
    first = next(iter(merges[OURS].gates().values()))[0]
    assert first.shape[0] == 3 and first.dtype == dtype


def test_the_published_procedure_refuses_what_was_not_published(base_model):
    for options in (dict(reduce="token"), dict(gates="all"), dict(constraint="none"), dict(precision="bf16")):
        with pytest.raises(ValueError, match="published procedure"):
            Published(base_model, get("clip"), contenders.MingleOptions(**options), ("q_proj",))
