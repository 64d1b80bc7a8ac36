"""Blocks whose weights are shared out: what they compute, and how much of them each process has."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_decoders import CONFIGS, built
from torch import nn
from worlds import world

import mingle
from mingle import ranks
from mingle.adaptation.prefix_cache import frozen_prefix
from mingle.nn.early_stop import run_until
from mingle.nn.sharded import ShardedBlocks, entries, is_sharded, own_part

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma3": "model.layers"}
TARGETS = {
    "llama": ("q_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_fc"),
    "gemma3": ("o_proj", "gate_proj"),
}


def model_of(name):
    """With two experts in some layers of every block."""
    model = built(CONFIGS[name]())
    layers = mingle.inject(model, TARGETS[name])
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        for _ in range(2):
            factors = ((6, layer.in_features), (layer.out_features, 6))
            A, B = (torch.randn(shape, generator=generator) for shape in factors)
            layer.add_expert(A, B, gate_weight=torch.randn(layer.in_features, generator=generator))
    return model, layers


def passed(model, number):
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(number))
    return model(input_ids=ids).logits


def held(model, name):
    """The bytes that a process has of weights in blocks that are not gates."""
    return sum(
        own_part(parameter).untyped_storage().nbytes()
        for key, parameter in model.get_submodule(BLOCKS[name]).named_parameters()
        if "gate_weight" not in key and "gate_bias" not in key
    )


def work(name):
    """Every rank makes other passes than the others, and another number of them."""
    model, layers = model_of(name)
    before = {key: layer.A.detach().clone() for key, layer in layers.items()}
    blocks = ShardedBlocks(model, [f"{BLOCKS[name]}.{i}" for i in range(3)])
    for block in blocks.blocks:
        blocks.share(block)
    size, logits = held(model, name), {}
    for number in (range(3), range(1), range(2))[ranks.rank()]:
        logits[number] = passed(model, number)
        logits[number].square().mean().backward()
    gradients = torch.cat([layer.gate_weight.grad.flatten() for layer in layers.values()])
    ranks.gather(None)
    for place in range(2):
        found = entries({key: layer.A for key, layer in layers.items()}, place)
        assert all(torch.equal(found[key], before[key][place]) for key in layers)
    for block in blocks.blocks:
        with blocks.changed(block):
            assert not is_sharded(model.get_submodule(block))
            for key, layer in layers.items():
                if key.startswith(f"{block}."):
                    A, B = torch.ones(4, layer.in_features), torch.ones(layer.out_features, 4)
                    layer.add_expert(A, B, gate_weight=A[0])
    after = passed(model, 5).detach()
    blocks.close()
    return {key: each.detach() for key, each in logits.items()}, gradients, size, after


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", 3),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
        pytest.param("gemma3", 2, marks=pytest.mark.slow),
    ],
)
def test_blocks_compute_what_whole_ones_do_whoever_passes_them_when(name, size):
    (logits, _, whole, after), found = work(name), world(size, lambda: work(name))
    for each in found:
        if isinstance(each, BaseException):
            raise each
    for mine, _, share, later in found:
        for number, own in mine.items():
            torch.testing.assert_close(own, logits[number])
        torch.testing.assert_close(later, after)
        # what cannot be divided evenly by three is padded
        assert whole / size <= share <= 1.1 * whole / size
    assert sum(len(mine) for mine, *_ in found) == (6 if size == 3 else 4)
    torch.testing.assert_close(found[0][1], work(name)[1])


def test_a_pass_that_ends_inside_a_block_leaves_it_shared_out():
    def stopped():
        model, layers = model_of("llama")
        blocks = ShardedBlocks(model, ["model.layers.0", "model.layers.1"])
        for block in blocks.blocks:
            blocks.share(block)
        if ranks.rank() == 1:
            inside = model.get_submodule("model.layers.1.mlp")
            assert run_until([inside], lambda: passed(model, 0))
        left = is_sharded(model.get_submodule("model.layers.1"))
        found = passed(model, 0)
        found.sum().backward()
        with frozen_prefix(model, layers.values(), lambda _: 1 / 0, 3, 2) as select:  # which keeps nothing
            select(torch.tensor([0]))
        return left, found.detach()

    expected = passed(model_of("llama")[0], 0)
    for left, found in world(2, stopped):
        assert left
        torch.testing.assert_close(found, expected)


def test_what_other_modules_have_too_stays_whole():
    class Block(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.own, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(()))
            self.tied = tied

        def forward(self, x):
            return self.own(self.tied(x)) * self.scale

    def run():
        torch.manual_seed(0)
        tied = nn.Linear(4, 4, bias=False)
        model = nn.Sequential(Block(tied), Block(copy.copy(tied)))
        expected = model(torch.ones(1, 4))
        blocks = ShardedBlocks(model, ["0", "1"])
        for block in blocks.blocks:
            blocks.share(block)
        names = {name for name, p in model.named_parameters() if own_part(p) is p}
        return (
            names,
            torch.equal(model(torch.ones(1, 4)), expected),
            model[0].tied.weight is model[1].tied.weight,
        )

    assert world(2, run) == [({"0.tied.weight", "0.scale", "1.scale"}, True, True)] * 2


def test_packed_layers_are_refused():
    def run():
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        mingle.inject(model, ("0.0",), prepack=True)
        ShardedBlocks(model, ["0"]).share("0")

    for error in world(2, run):
        assert isinstance(error, ValueError | ranks.OtherRankFailed)
        assert "0: layers that keep their weights packed cannot be shared out" in str(error)
