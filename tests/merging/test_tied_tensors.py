"""Models whose whole is the tower and whose tensors are tied: each tensor counts once, wherever its names
are.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mingle.methods import Arrival, get
from mingle.methods.base import PlainMethod
from mingle.methods.opcm import total_norm
from mingle.methods.ties import trim_threshold
from mingle.tasks import TaskData, TaskType

SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class WholeModel(TaskType):
    def logits(self, model, data):
        return model(
            input_ids=data.inputs["input_ids"], decoder_input_ids=data.inputs["decoder_input_ids"]
        ).logits.flatten(0, 1)


@pytest.fixture(scope="module")
def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def tuned(base):
    generator, states = torch.Generator().manual_seed(1), []
    for _ in range(3):
        model = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        states.append({name: tensor.detach() for name, tensor in model.state_dict().items()})
    return states


def merged(base, tuned, name, options=None):
    model = copy.deepcopy(base)
    state = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    method = get(name)(model, WholeModel(), state, options or get(name).Options())
    generator = torch.Generator().manual_seed(2)
    seeds = TaskData(
        {key: torch.randint(40, (6, 5), generator=generator) for key in ("input_ids", "decoder_input_ids")}
    )
    for i, part in enumerate(tuned):
        method.add(Arrival(i, f"task{i}", part, seeds if method.needs_seeds else None, lambda: model, seed=i))
    return method


def test_tied_tensors_count_once(base, tuned):
    method = merged(base, tuned, "task-arithmetic")
    assert set(SHARED) & method.base.keys() == {"shared.weight"}
    distinct = {id(parameter): parameter for parameter in base.parameters()}
    assert sum(tensor.numel() for tensor in method.base.values()) == sum(p.numel() for p in distinct.values())
    _, delta = method.vectors(tuned[0])
    entries = torch.cat(
        [(tuned[0][name] - base.state_dict()[name]).flatten() for name, _ in base.named_parameters()]
    )
    squares = [float(tensor.double().square().sum()) for tensor in delta.values()]
    assert total_norm(squares) == pytest.approx(float(entries.double().norm()), rel=1e-12)
    assert (
        trim_threshold(delta, 0.2)
        == sorted(entries.abs().tolist(), reverse=True)[math.floor(0.2 * len(entries)) - 1]
    )


@pytest.mark.parametrize(
    "name", ["average", "task-arithmetic", "ties", "magmax", "consensus-ta", "opcm", "adamerging"]
)
def test_every_method_moves_all_names_of_a_tied_tensor_together(base, tuned, name):
    method = merged(base, tuned, name)
    state = method.model.state_dict()
    for alias in SHARED:
        assert torch.equal(state[alias], method.merged["shared.weight"])
    assert not torch.equal(state["shared.weight"], base.state_dict()["shared.weight"])
    embeddings = [
        module.weight
        for module in method.model.modules()
        if isinstance(module, torch.nn.Embedding) and module.weight.shape[0] == 40
    ]
    assert len({id(weight) for weight in embeddings}) == 1
    again = copy.deepcopy(method)
    assert isinstance(again, PlainMethod)
    again.restore([], method.state_tensors())
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.model.state_dict().items())


def test_whole_models_average_plainly(base, tuned):
    state = merged(base, tuned, "average").model.state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, sum(part[name].double() for part in tuned).div(3).float())
