"""NUFILT against its own formula: autograd and Adam in float64, layer by layer, everything computed anew."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import nn

import mingle
from mingle.linalg.sketch import gaussian
from mingle.methods import nufilt
from mingle.methods.nufilt import NufiltOptions

OPTIONS = dict(r_p=6, r_v=3, r_l=4, lr=1e-2, steps=12)
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


def plain(delta, merged, name, seed, r_p, r_v, r_l, lr, steps):
    """Δ(P + BA) by the published loss as it is written."""
    delta, merged = delta.double(), merged.double()
    d = delta.shape[1]

    def right(matrix, rank):
        _, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return Vh[: min(rank, int((1e-6 * S[0] < S).sum()))].T

    old, new = right(merged, r_p), right(delta, r_v)
    P = torch.eye(d, dtype=torch.float64) - old @ old.T
    start = 0.02 * gaussian(seed, [name], min(r_l, *delta.shape), d, delta.device, torch.float32)[0]
    A = start.double().requires_grad_()
    B = torch.zeros(d, len(A), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([A, B], lr=lr, foreach=False)
    for _ in range(steps):
        total = merged + delta @ (P + B @ A)
        loss = ((delta - total) @ new).square().sum() + ((merged - total) @ old).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (delta @ (P + B @ A)).detach()


def layers(*shapes, rank=None, scale=0.05):
    found = {}
    for i, (m, d) in enumerate(shapes):
        matrix = torch.randn(m, d) if rank is None else torch.randn(m, rank) @ torch.randn(rank, d)
        found[f"layer{i}"] = scale * matrix
    return found


def assert_close(found, expected, tolerance=2e-5):
    for name, value in expected.items():
        assert (found[name].double() - value).norm() <= tolerance * value.norm(), name


def test_a_merge_is_the_formula(base_model, tuned_states):
    merger = mingle.Merger(base_model, "nufilt", seed=5, **OPTIONS)
    base = {name: tensor.double() for name, tensor in base_model.vision_model.state_dict().items()}
    linear = [
        n
        for n, m in base_model.vision_model.named_modules()
        if isinstance(m, nn.Linear) and n.endswith(TARGETS)
    ]
    assert len(linear) == 10
    expected = {n: torch.zeros_like(base[f"{n}.weight"]) for n in linear}
    for i, state in enumerate(tuned_states):
        merger.add(f"task{i}", state)
        for n in linear:
            delta = state[f"{n}.weight"].double() - base[f"{n}.weight"]
            seed = zlib.crc32(f"5/{i}".encode())
            expected[n] += delta if i == 0 else plain(delta, expected[n], f"{n}.weight", seed, **OPTIONS)
    found = merger.model.vision_model.state_dict()
    assert_close({n: found[f"{n}.weight"] - base[f"{n}.weight"] for n in linear}, expected)
    others = [name for name in base if name not in {f"{n}.weight" for n in linear}]
    assert all(torch.equal(found[name].double(), base[name]) for name in others)


@pytest.mark.parametrize("shape", [(16, 16), (40, 10), (6, 20), (5, 8)], ids=str)
@pytest.mark.parametrize(
    "ranks", [dict(r_p=3, r_v=2, r_l=4), dict(r_p=128, r_v=8, r_l=64)], ids=["small", "clamped"]
)
def test_any_shape_and_rank(shape, ranks):
    delta, merged = layers(shape), layers(shape)
    options = OPTIONS | ranks
    found = nufilt.updates(delta, merged, NufiltOptions(**options), 7)
    assert_close(found, {"layer0": plain(delta["layer0"], merged["layer0"], "layer0", 7, **options)}, 1e-4)


def test_a_merged_update_of_low_rank_is_all_that_is_filtered_out():
    """Beyond its rank M has no singular vectors; arbitrary ones would take directions out of Δ in vain."""
    delta, merged = layers((16, 12)), layers((16, 12), rank=2)
    found = nufilt.updates(delta, merged, NufiltOptions(**OPTIONS), 7)
    assert_close(found, {"layer0": plain(delta["layer0"], merged["layer0"], "layer0", 7, **OPTIONS)})
    untrained = nufilt.updates(delta, merged, NufiltOptions(**(OPTIONS | {"steps": 0})), 7)["layer0"]
    assert torch.linalg.matrix_rank(delta["layer0"] - untrained, rtol=1e-4) == 2
    assert (untrained @ merged["layer0"].T).norm() < 1e-6


def test_zero_updates():
    delta, merged = layers((8, 6), (8, 6), (8, 6)), layers((8, 6), (8, 6), (8, 6))
    merged["layer0"].zero_()  # the first task is just added
    delta["layer1"].zero_()
    found = nufilt.updates(delta, merged, NufiltOptions(**OPTIONS), 0)
    assert torch.equal(found["layer0"], delta["layer0"])
    assert not found["layer1"].any()
    assert found["layer2"].isfinite().all() and not torch.equal(found["layer2"], delta["layer2"])


def test_layers_together_and_alone():
    shapes = [(16, 12)] * 3 + [(30, 12), (4, 12)]
    delta, merged = layers(*shapes), layers(*shapes)
    options = NufiltOptions(**OPTIONS)
    together = nufilt.updates(delta, merged, options, 3)
    assert len({tuple(part.flatten().tolist()) for part in together.values()}) == len(shapes)
    for name in delta:
        alone = nufilt.updates({name: delta[name]}, {name: merged[name]}, options, 3)
        assert torch.equal(alone[name], together[name])
    again = nufilt.updates(dict(reversed(delta.items())), merged, options, 3)
    assert all(torch.equal(again[name], together[name]) for name in delta)
    assert not torch.equal(nufilt.updates(delta, merged, options, 4)["layer0"], together["layer0"])


@pytest.mark.parametrize("shape", [(9, 7), (3, 8)], ids=str)
def test_a_batch_is_its_layers(shape):
    """Layers of one shape are trained together on a GPU; the same function serves both."""
    torch.set_default_dtype(torch.float64)
    try:
        deltas, merged = torch.randn(3, *shape), torch.randn(3, *shape)
        old, new = (
            torch.linalg.svd(part, full_matrices=False).Vh[:, :k].mT for part, k in ((merged, 2), (deltas, 1))
        )
        start = 0.02 * torch.randn(3, 3, shape[1])
        parts = deltas, merged, old, new, start
        together = nufilt.trained(*parts, 10, 1e-2)
        alone = [nufilt.trained(*(part[i] for part in parts), 10, 1e-2) for i in range(3)]
    finally:
        torch.set_default_dtype(torch.float32)
    for batched, singles in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(singles), rtol=1e-8, atol=1e-10)


def test_the_base_again_and_again(base_model, tuned_states):
    """A model equal to the base changes nothing, first or later."""
    base = base_model.vision_model.state_dict()
    merger, twin = (mingle.Merger(base_model, "nufilt", **OPTIONS) for _ in range(2))
    merger.add("nothing", base)
    assert all(
        torch.equal(base[name], tensor) for name, tensor in merger.model.vision_model.state_dict().items()
    )
    merger.add("something", tuned_states[0])
    twin.add("something", tuned_states[0])
    merged = merger.model.vision_model.state_dict()
    merger.add("nothing again", base)
    for name, tensor in merger.model.vision_model.state_dict().items():
        assert torch.equal(tensor, merged[name]) and torch.equal(
            tensor, twin.model.vision_model.state_dict()[name]
        )


def test_a_saved_merge_goes_on_bit_for_bit(base_model, tuned_states, tmp_path):
    whole = mingle.Merger(base_model, "nufilt", seed=1, **OPTIONS)
    for i in range(2):
        whole.add(f"task{i}", tuned_states[i])
    whole.save_pretrained(tmp_path)
    resumed = mingle.Merger.from_pretrained(tmp_path)
    for merger in (whole, resumed):
        merger.add("task2", tuned_states[2])
    found = resumed.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_half_precision_towers(base_model, tuned_states):
    import copy

    half = copy.deepcopy(base_model).to(torch.bfloat16)
    merger = mingle.Merger(half, "nufilt", **OPTIONS)
    for i, state in enumerate(tuned_states):
        merger.add(f"task{i}", state)
    assert all(
        t.dtype == torch.bfloat16 and t.isfinite().all()
        for t in merger.model.vision_model.state_dict().values()
    )


def test_options():
    for wrong in (dict(r_p=0), dict(r_v=0), dict(r_l=0), dict(lr=-1.0), dict(steps=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NufiltOptions(**wrong)


def test_target_layers(base_model):
    merger = mingle.Merger(base_model, "nufilt", layers=["mlp.fc2"])
    assert merger.method.targets == [f"encoder.layers.{i}.mlp.fc2.weight" for i in range(2)]
    with pytest.raises(ValueError, match="no Linear layer's name ends in 'fc3'"):
        mingle.Merger(base_model, "nufilt", layers=["fc3"])
