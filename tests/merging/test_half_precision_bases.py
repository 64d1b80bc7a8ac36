"""A base in half precision: what is summed up is kept in float32 and rounded once, when the model gets it."""

from __future__ import annotations

import copy

import pytest
import torch
from small_merges import same_bits

import mingle
from mingle.tasks import TaskData

TASKS = 20
WEIGHTS = ("average", "task-arithmetic", "ties", "magmax", "consensus-ta", "opcm")
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture(scope="module")
def small_steps(base_model):
    """Twenty fine-tuned towers in float32, each a small step away from the base, in part the same one."""
    generator = torch.Generator().manual_seed(5)
    tower = base_model.vision_model.state_dict()
    shared = {name: 3e-4 * torch.randn(t.shape, generator=generator) for name, t in tower.items()}
    return [
        {
            name: t + shared[name] + 2e-4 * torch.randn(t.shape, generator=generator)
            for name, t in tower.items()
        }
        for _ in range(TASKS)
    ]


def tower_after(base, states, method, seeds=None, **options):
    merger = mingle.Merger(base, method, **options)
    for i, state in enumerate(states):
        merger.add(f"t{i}", state, seeds)
    return merger


def updates(merged, base):
    return torch.cat([(merged[name].double() - base[name].double()).flatten() for name in base])


@halves
@pytest.mark.parametrize("method", WEIGHTS)
def test_twenty_small_updates_are_rounded_once(method, dtype, base_model, small_steps):
    base = copy.deepcopy(base_model).to(dtype)
    start = {name: tensor.clone() for name, tensor in base.vision_model.state_dict().items()}
    got = tower_after(base, small_steps, method).model.vision_model.state_dict()
    exact = copy.deepcopy(base).double()
    wanted = tower_after(exact, small_steps, method).model.vision_model.state_dict()
    once = {name: tensor.to(dtype) for name, tensor in wanted.items()}
    update = updates(wanted, start)
    error, unavoidable = ((updates(x, start) - update).norm() / update.norm() for x in (got, once))
    # float32 may fall on the other side of a midpoint between two half-precision numbers, but rarely; more
    # often on that of the magnitude at which TIES trims.
    assert error <= (2 if method == "ties" else 1.01) * unavoidable


@halves
@pytest.mark.parametrize("method", ["average", "opcm", "wemoe", "adamerging"])
def test_a_resumed_merge_of_half_precision_goes_on_bit_for_bit(
    method, dtype, base_model, small_steps, samples, tmp_path
):
    base = copy.deepcopy(base_model).to(dtype)
    options = {} if method in WEIGHTS else dict(steps=2, batch_size=8)
    pixels = samples[0].inputs["pixel_values"].to(dtype)
    seeds = TaskData({"pixel_values": pixels}, samples[0].shared)
    straight = tower_after(base, small_steps[:4], method, seeds, **options)
    tower_after(base, small_steps[:2], method, seeds, **options).save_pretrained(tmp_path)
    resumed = mingle.Merger.from_pretrained(tmp_path)
    for i in (2, 3):
        resumed.add(f"t{i}", small_steps[i], seeds)
    same_bits(resumed.model.state_dict(), straight.model.state_dict())
    same_bits(resumed.method.state_tensors(), straight.method.state_tensors())


@halves
def test_the_attention_that_wemoe_sums_up_is_rounded_once(dtype, base_model, small_steps, samples):
    base = copy.deepcopy(base_model).to(dtype)
    seeds = TaskData({"pixel_values": samples[0].inputs["pixel_values"].to(dtype)}, samples[0].shared)
    merger = tower_after(base, small_steps, "wemoe", seeds, steps=0, rank=2, later_rank=2)
    got = merger.model.vision_model.state_dict()
    for name in merger.method.attention:
        start = base.vision_model.state_dict()[name].double()
        wanted = start + 0.3 * sum(state[name].double() - start for state in small_steps)
        apart = (got[name] != wanted.to(dtype)).double().mean()
        assert apart < 0.01, name


def test_an_export_has_the_base_s_dtype(base_model, small_steps, tmp_path):
    from safetensors.torch import load_file

    base = copy.deepcopy(base_model).to(torch.bfloat16)
    merger = tower_after(base, small_steps[:3], "average")
    merger.export(tmp_path / "plain")
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    same_bits(exported, dict(merger.model.state_dict()))
