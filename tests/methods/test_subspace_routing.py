"""MADE-IT and MASS: affinities, joined experts and gates against their formulas."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_merges import NAMES, same_bits

import mingle
from mingle.methods.layer_router import Moments
from mingle.methods.made_it import affinity, alignments, averaged, threshold
from mingle.methods.mass import MassOptions, ResidualRouter
from mingle.nn.linear import MingleLinear
from mingle.nn.low_rank_expert import LowRankExpert

OPTIONS = {"made-it": {"share": 0.25}, "mass": {"rank": 6}}


def merge(base, method, tuned, samples, count=3, **options):
    merger = mingle.Merger(base, method, **(OPTIONS[method] | options))
    for i in range(count):
        merger.add(NAMES[i], tuned[i])
    return merger


def logits(merger, data):
    with torch.no_grad():
        return merger.task.logits(merger.model, data)


def everything(merger):
    kept = {
        f"{i}/{k}": v for i in range(len(merger.merged)) for k, v in merger.method.task_tensors(i).items()
    }
    return kept | merger.method.state_tensors() | merger.model.state_dict()


def expert(seed, m=10, n=12, rank=3):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return LowRankExpert.from_dense(delta, rank)


def test_affinity_is_one_for_equal_subspaces_and_zero_for_orthogonal_ones():
    Q = torch.linalg.qr(torch.randn(9, 9).double())[0]
    rotated = torch.linalg.qr(torch.randn(3, 3).double())[0] @ Q[:3]
    assert affinity(Q[:3], rotated) == pytest.approx(1)
    assert affinity(Q[:3], Q[3:6]) == pytest.approx(0, abs=1e-12)
    assert affinity(Q[:3], Q[1:4]) == pytest.approx(2 / 3)


def test_the_threshold_stands_out_of_all_affinities():
    assert threshold([0.1, 0.2, 0.3], 2.0) == pytest.approx(0.2 + 2 * 0.1)
    assert threshold([0.5], 1.0) == threshold([0.2, 1.0], 1.0) == 0.8


def test_an_expert_that_is_joined_is_the_truncated_mean():
    first, second, third = (expert(seed) for seed in range(3))
    pair = averaged(first, 1, second)
    U, S, Vh = torch.linalg.svd((first.delta() + second.delta()).double() / 2)
    torch.testing.assert_close(pair.delta().double(), (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)
    same = averaged(averaged(first, 1, first), 2, first)
    torch.testing.assert_close(same.delta(), first.delta(), rtol=1e-4, atol=1e-5)
    triple = averaged(LowRankExpert(pair.A, pair.B), 2, third)
    U, S, Vh = torch.linalg.svd((2 * pair.delta() + third.delta()).double() / 3)
    torch.testing.assert_close(triple.delta().double(), (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-5)


def test_alignments_are_shares_of_the_input():
    experts = [expert(seed) for seed in range(2)]
    A = torch.stack([each.A for each in experts])
    x = torch.randn(4, 5, 12)
    found = alignments(x, A)
    for i, each in enumerate(experts):
        P = torch.linalg.pinv(each.A) @ each.A
        expected = (x @ P).square().sum(-1) / x.square().sum(-1)
        torch.testing.assert_close(found[..., i], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alignments(experts[0].A[:1], A)[0, 0], torch.tensor(1.0))
    assert torch.equal(alignments(torch.zeros(1, 12), A), torch.zeros(1, 2))


@pytest.mark.parametrize(("reduce", "dims"), [("token", ()), ("sample", 1), ("batch", (0, 1))])
def test_made_it_gives_every_layer_the_softmax_of_its_own_inputs(
    base_model, tuned_states, samples, reduce, dims
):
    options = {"spread": 100.0, "temperature": 0.1, "reduce": reduce}
    merger = merge(base_model, "made-it", tuned_states, samples, **options)
    seen = {}

    def note(layer, args, output):
        seen["x"], seen["y"] = args[0], output

    layer = merger.method.layers["encoder.layers.1.mlp.fc1"]
    handle = layer.register_forward_hook(note)
    logits(merger, samples[0])
    handle.remove()
    x = seen["x"]
    g = alignments(x, layer.A)
    g = ((g.mean(dims, keepdim=True) if dims else g) / 0.1).softmax(-1)
    assert g.shape[2] == 3 and g.std(2).max() > 0
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for i, each in enumerate(layer.experts()):
        expected = expected + g[..., i, None] * (x @ each.delta().T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-5)
    assert layer.given_gates is None


def test_tasks_that_read_the_same_inputs_share_an_expert(base_model, tuned_states):
    merger = mingle.Merger(base_model, "made-it", share=0.25, spread=3.0)
    again = {name: tensor.clone() for name, tensor in tuned_states[0].items()}
    # the same update as the first task's in one half of the layers, another one in the others
    for name in again:
        if "layers.1" in name:
            again[name] = tuned_states[1][name]
    for name, state in (("a", tuned_states[0]), ("b", tuned_states[1]), ("c", again)):
        merger.add(name, state)
    for name, layer in merger.method.layers.items():
        assert merger.method.owned[name][:2] == [0, 1]
        assert merger.method.owned[name][2] == (1 if "layers.1" in name else 0)
        assert layer.num_experts == 2
    before = LowRankExpert.from_dense(
        tuned_states[0]["encoder.layers.0.mlp.fc1.weight"]
        - base_model.vision_model.state_dict()["encoder.layers.0.mlp.fc1.weight"],
        merger.method.layers["encoder.layers.0.mlp.fc1"].rank,
    )
    joined = merger.method.layers["encoder.layers.0.mlp.fc1"].experts()[0]
    torch.testing.assert_close(joined.delta(), before.delta(), rtol=1e-3, atol=1e-5)


def test_mass_tells_where_its_experts_span_all_inputs(base_model, tuned_states):
    method = mingle.Merger(base_model, "mass").method
    width = method.layers[method.deciding].in_features
    told = f"has {width} inputs, and experts of rank {width} span them all"
    for rank in (4, width):
        notes = mingle.Merger(base_model, "mass", rank=rank).add("one", tuned_states[0]).notes
        assert any(told in note for note in notes) == (rank == width)


def test_mass_opens_the_gates_of_the_tasks_with_the_smallest_residuals():
    layer = MingleLinear.from_linear(torch.nn.Linear(12, 10))
    for seed in range(3):
        layer.add_expert(*expert(seed))
    z = torch.cat([expert(1).A[:1], expert(0).A[:1] + expert(2).A[:1], torch.zeros(1, 12)])
    moments = [Moments(z, torch.zeros_like(z))]
    router = ResidualRouter(layer, MassOptions(threshold=0.3))
    expected = torch.stack(
        [(z - z @ torch.linalg.pinv(each.A) @ each.A).norm(dim=1) for each in layer.experts()], 1
    )
    torch.testing.assert_close(router.residuals(moments), expected, rtol=1e-4, atol=1e-4)
    assert router.likeliest(moments)[:2].tolist() == [1, int(expected[1].argmin())]
    weights = (-expected).softmax(1)
    gates = router.gates(moments)
    for row, weight in zip(gates, weights, strict=True):
        heaviest = weight.topk(2).indices.tolist()
        wanted = {heaviest[0]} | {i for i in heaviest if weight[i] > 0.3}
        assert set(row.nonzero().flatten().tolist()) == wanted
    one = ResidualRouter(layer, MassOptions(most=1)).gates(moments)
    assert torch.equal(one.sum(1), torch.ones(3))


@pytest.mark.parametrize("method", OPTIONS)
def test_resuming_copying_and_pickling_keep_it(base_model, tuned_states, samples, tmp_path, method):
    whole = merge(base_model, method, tuned_states, samples)
    merge(base_model, method, tuned_states, samples, 2).save_pretrained(tmp_path)
    resumed = mingle.Merger.from_pretrained(tmp_path)
    resumed.add(NAMES[2], tuned_states[2])
    same_bits(everything(whole), everything(resumed))
    expected = logits(whole, samples[0])
    for model in (resumed.model, copy.deepcopy(whole.model), pickle.loads(pickle.dumps(whole.model))):
        with torch.no_grad():
            assert torch.equal(whole.task.logits(model, samples[0]), expected)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_skipped_task_leaves_no_expert(base_model, tuned_states, samples, tmp_path, method):
    merger = merge(base_model, method, tuned_states, samples, 1)
    merger.add("same", base_model)
    merger.add(NAMES[1], tuned_states[1])
    assert merger.method.places == [0, None, 1]
    without = merge(base_model, method, tuned_states, samples, 2)
    assert torch.equal(logits(merger, samples[0]), logits(without, samples[0]))
    merger.save_pretrained(tmp_path)
    again = mingle.Merger.from_pretrained(tmp_path)
    assert again.method.places == [0, None, 1]
    assert torch.equal(logits(again, samples[0]), logits(merger, samples[0]))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("made-it", dict(share=0.0), "share=0.0"),
        ("made-it", dict(temperature=0.0), "temperature=0.0"),
        ("made-it", dict(reduce="words"), "reduce: 'words'; expected one of"),
        ("mass", dict(depth=2), "depth=2: the model has 2 blocks, numbered from 0"),
        ("mass", dict(threshold=2.0), "threshold=2.0"),
        ("mass", dict(most=0), "most=0"),
    ],
)
def test_bad_options_are_refused(base_model, method, options, message):
    with pytest.raises(ValueError, match=message):
        mingle.Merger(base_model, method, **options)
