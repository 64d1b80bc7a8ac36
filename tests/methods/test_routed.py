"""Routed experts: the router against dense formulas, and the merged model against every task's own expert."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from small_merges import NAMES, same_bits

import mingle
from mingle.adaptation.mean_gates import mean_gates
from mingle.methods.layer_router import Moments
from mingle.methods.router import (
    FeatureSpace,
    FeatureStatistics,
    GaussianRouter,
    strangeness,
    strangeness_left_out,
)
from mingle.methods.router_choice import TEMPERATURES, Setting, choose, measured, settings
from mingle.methods.task_router import candidates
from mingle.nn.observe import gates_made_of
from mingle.tasks import TaskData

OPTIONS = dict(rank=6, depths=(0, 1))


def shifted(samples, i):
    """Samples that the task can be told by."""
    pixels = samples[i].inputs["pixel_values"] * (1, 0.4, 2)[i] + (0, 3, -3)[i]
    return TaskData({"pixel_values": pixels}, samples[i].shared, samples[i].labels)


def merge(base_model, tuned_states, samples, count=3, **options):
    merger = mingle.Merger(base_model, "routed", **(OPTIONS | options))
    for i in range(count):
        merger.add(NAMES[i], tuned_states[i], TaskData(shifted(samples, i).inputs, samples[i].shared))
    return merger


def moments(features):
    """Features [n, 2 · 2 · 32] as the router reads them at two sites."""
    first, second, *deviations = features.split(32, 1)
    return [Moments(mean, each) for mean, each in zip((first, second), deviations, strict=True)]


def logits(merger, data):
    with torch.no_grad():
        return merger.task.logits(merger.model, data)


def own_expert(base_model, tuned, rank):
    """The base with the truncated task vectors of all linear layers added to its weights."""
    model = copy.deepcopy(base_model)
    for name, module in model.vision_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            U, S, Vh = torch.linalg.svd(
                tuned[f"{name}.weight"].double() - module.weight.double(), full_matrices=False
            )
            module.weight.data += ((U[:, :rank] * S[:rank]) @ Vh[:rank]).float()
    return model


@pytest.fixture
def clouds():
    """Features [n, 7] of three tasks of different sizes; the last feature never varies."""
    sets = [
        torch.randn(n, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 2 * i
        for i, n in enumerate((5, 30, 12))
    ]
    for features in sets:
        features[:, 6] = 4.0
    return sets


def router(clouds, own=0.2, shrinkage=0.05):
    space = FeatureSpace([FeatureStatistics.of(x) for x in clouds])
    return GaussianRouter(space, own=own, shrinkage=shrinkage)


def plain_scores(clouds, x, own, shrinkage, deviation=None):
    """The formula as it stands, with all matrices in full."""
    tasks, width = len(clouds), clouds[0].shape[1]
    covariances = [torch.cov(features.T) for features in clouds]
    deviation = torch.stack([c.diagonal() for c in covariances]).mean(0).sqrt()
    scale = torch.where(deviation > 1e-12, 1 / deviation, 0)
    scaled = [c * scale * scale[:, None] for c in covariances]
    columns = []
    for i, features in enumerate(clouds):
        v = 1 + 1 / len(features)
        Q = (1 - shrinkage) * ((1 - own) * sum(scaled) / tasks + own * scaled[i])
        Q = v * (Q + shrinkage * torch.eye(width, dtype=torch.float64))
        z = (x - features.mean(0)) * scale
        columns.append(-0.5 * ((z @ Q.inverse() * z).sum(1) + torch.logdet(Q)))
    return torch.stack(columns, 1)


def assert_same_posteriors(got, expected, **tolerance):
    torch.testing.assert_close(got.log_softmax(1), expected.log_softmax(1), **tolerance)


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_scores_are_the_predictive_gaussians_log_likelihoods(clouds, own):
    x = torch.randn(4, 7, dtype=torch.float64)
    x[:, 6] = 4.0
    assert_same_posteriors(router(clouds, own).scores(x), plain_scores(clouds, x, own, 0.05))


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_so_they_are_where_samples_are_fewer_than_features(own):
    few = [torch.randn(n, 20, dtype=torch.float64) + i for i, n in enumerate((3, 4, 5))]
    x = torch.randn(6, 20, dtype=torch.float64)
    assert_same_posteriors(router(few, own).scores(x), plain_scores(few, x, own, 0.05))


@pytest.mark.parametrize("own", [0.0, 0.2])
@pytest.mark.parametrize("width", [6, 50])
def test_samples_are_left_out_without_fitting_again(width, own):
    clouds = [torch.randn(n, width, dtype=torch.float64) + 0.3 * i for i, n in enumerate((30, 40, 35))]
    newest = clouds[-1]
    got = router(clouds, own, 0.2).scores_left_out(newest)
    inside = router(clouds, own, 0.2).scores(newest)
    expected = torch.cat(
        [
            plain_scores([*clouds[:-1], newest[torch.arange(35) != i]], newest[i : i + 1], own, 0.2)
            for i in range(35)
        ]
    )
    error, bias = ((scores.log_softmax(1) - expected.log_softmax(1)).abs().mean() for scores in (got, inside))
    assert error < 0.15 * bias  # what is left out of the update is much less than what it corrects


def test_strangeness_is_the_mean_squared_deviation(clouds):
    x = torch.randn(4, 7, dtype=torch.float64)
    for features in clouds:
        task = FeatureStatistics.of(features)
        squares = (x - features.mean(0))[:, :6].square() / features.var(0)[:6]
        torch.testing.assert_close(strangeness(x, task.mean, task.variances), squares.mean(1))
        own = strangeness(features, task.mean, task.variances)
        torch.testing.assert_close(own.sum() / (len(features) - 1), torch.tensor(1.0, dtype=torch.float64))
        for i, left_out in enumerate(strangeness_left_out(features, task)):
            others = FeatureStatistics.of(features[torch.arange(len(features)) != i])
            again = strangeness(features[i : i + 1], others.mean, others.variances)[0]
            torch.testing.assert_close(left_out, again)


def test_statistics_refuse_what_says_nothing(clouds):
    with pytest.raises(ValueError, match="1 seed samples: a router needs at least two"):
        FeatureStatistics.of(clouds[0][:1])
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(clouds[0] * float("nan"))


def test_features_that_never_vary_say_nothing():
    same = [torch.ones(4, 3), torch.zeros(4, 3)]
    assert torch.equal(*router(same).scores(torch.ones(2, 3)).unbind(1))
    task = FeatureStatistics.of(same[0])
    assert torch.equal(strangeness(torch.ones(2, 3), task.mean, task.variances), torch.zeros(2).double())


def told_apart(signal, seed=0):
    """What is kept of three tasks of 40 samples with 4 means and 4 deviations, that far apart."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for i in range(3):
        features = torch.randn(40, 8, generator=generator)
        features[:, 0] += signal * i
        kept.append(measured(features, kept, settings(None, None, None)))
    return kept


def test_the_shallowest_of_the_best_depths_is_chosen():
    grid = settings(None, None, None)
    depths = [told_apart(signal) for signal in (0.5, 3.0, 9.0, 9.0)]
    choice = choose([[depth[i] for depth in depths] for i in range(3)], grid, None)
    assert choice.candidate == 2
    assert choice.losses[0] > choice.losses[1] > choice.losses[2] + 0.02
    assert choose([[depth[0] for depth in depths]], grid, None).candidate == 0  # one task tells nothing


def test_a_sure_router_is_not_tempered_and_a_guessing_one_is():
    grid = settings(None, None, None)
    sure, guessing = (choose([[kept] for kept in told_apart(signal)], grid, None) for signal in (20.0, 0.0))
    assert sure.temperature == TEMPERATURES[0]
    assert guessing.temperature > 2
    assert choose([[kept] for kept in told_apart(0.0)], grid, 3.0).temperature == 3.0


def test_what_is_fixed_is_not_chosen():
    assert settings(True, 0.3, 0.1) == (Setting(True, 0.3, 0.1),)
    assert {setting.spread for setting in settings(None, 0.3, 0.1)} == {True, False}
    assert candidates((2, 0), 4) == [(0, 2)]
    assert candidates(None, 3) == [(0,), (1,), (2,)]
    assert candidates(None, 33) == [(0,), (5,), (9,), (14,), (18,), (23,), (27,), (32,)]


def test_every_sample_is_answered_by_its_tasks_expert(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples)
    for i in range(3):
        expected = merger.task.logits(own_expert(base_model, tuned_states[i], 6), shifted(samples, i))
        torch.testing.assert_close(logits(merger, shifted(samples, i)), expected, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_is_answered_as_pure_ones(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples)
    data = [shifted(samples, i) for i in range(3)]
    mixed = TaskData(
        {"pixel_values": torch.cat([d.inputs["pixel_values"] for d in data])[torch.randperm(72)]},
        samples[0].shared,
    )
    one_by_one = torch.cat([logits(merger, mixed.select(slice(k, k + 1))) for k in range(72)])
    torch.testing.assert_close(logits(merger, mixed), one_by_one, rtol=1e-4, atol=1e-4)


def test_a_later_task_changes_nothing_for_samples_it_does_not_claim(base_model, tuned_states, samples):
    two, three = (merge(base_model, tuned_states, samples, count) for count in (2, 3))
    for key, value in two.method.task_tensors(0).items():
        assert torch.equal(value, three.method.task_tensors(0)[key]), key
    torch.testing.assert_close(
        logits(two, shifted(samples, 0)), logits(three, shifted(samples, 0)), rtol=1e-4, atol=1e-4
    )


def test_seniority_gives_contested_samples_to_the_older_task(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, seniority=1e6, abstain=None)
    expected = merger.task.logits(own_expert(base_model, tuned_states[0], 6), shifted(samples, 2))
    torch.testing.assert_close(logits(merger, shifted(samples, 2)), expected, rtol=1e-4, atol=1e-4)


def test_far_samples_go_to_the_base(base_model, tuned_states, samples):
    router = merge(base_model, tuned_states, samples).method.router.router
    assert torch.equal(router.gates(moments(router.means)), torch.eye(3))
    assert torch.equal(
        router.gates(moments(router.means + 10 * router.variances.sum(0).sqrt())), torch.zeros(3, 3)
    )
    all_far = merge(base_model, tuned_states, samples, abstain=1e-9, gates="hard")
    assert all_far.method.router.router.limits is not None
    all_far.method.router.router.limits.zero_()
    expected = all_far.task.logits(base_model, shifted(samples, 1))
    torch.testing.assert_close(logits(all_far, shifted(samples, 1)), expected, rtol=1e-5, atol=1e-5)


def test_few_clean_samples_are_found_strange(base_model, tuned_states, samples):
    """Of samples drawn as the seeds were, no more than what three standard deviations leave."""
    router = merge(base_model, tuned_states, samples).method.router.router
    width = router.means.shape[1]
    drawn = router.means[0] + torch.randn(2000, width) * router.variances[0].sqrt()
    assert (router.gates(moments(drawn)).sum(1) == 0).double().mean() < 0.02


def test_soft_gates_are_the_tempered_posterior(base_model, tuned_states, samples):
    options = dict(seniority=0.3, abstain=None, temperature=600.0)
    router = merge(base_model, tuned_states, samples, **options).method.router.router
    features = router.means.mean(0) + torch.randn(5, 2 * 2 * 32) * 0.1
    scores = router.gaussians.scores(features) / 600 + torch.tensor([0.6, 0.3, 0.0])
    expected = scores.softmax(1)
    assert ((expected > 0.05).sum(1) > 1).any()
    expected[expected < 0.01] = 0
    torch.testing.assert_close(
        router.gates(moments(features)), (expected / expected.sum(1, keepdim=True)).float()
    )


def test_the_report_says_what_was_chosen_and_why(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "routed", rank=6)
    notes = [
        merger.add(NAMES[i], tuned_states[i], TaskData(shifted(samples, i).inputs, samples[i].shared)).notes
        for i in range(2)
    ]
    assert not any("routing" in note for note in notes[0])
    (told,) = [note for note in notes[1] if "routing" in note]
    assert re.fullmatch(
        r"routing reads means( and standard deviations)? (after 1 block|after \d blocks|of the embeddings): "
        r"seed samples left out are given to their own task with a probability of (9\d|100) %",
        told,
    )


def test_resuming_copying_and_pickling_keep_the_router(base_model, tuned_states, samples, tmp_path):
    whole = merge(base_model, tuned_states, samples)
    merge(base_model, tuned_states, samples, 2).save_pretrained(tmp_path / "two")
    resumed = mingle.Merger.from_pretrained(tmp_path / "two")
    resumed.add(NAMES[2], tuned_states[2], TaskData(shifted(samples, 2).inputs, samples[2].shared))
    same_bits(
        *(
            {f"{i}.{k}": v for i in range(3) for k, v in m.method.task_tensors(i).items()}
            for m in (whole, resumed)
        )
    )
    expected = logits(whole, shifted(samples, 1))
    for model in (resumed.model, copy.deepcopy(whole.model), pickle.loads(pickle.dumps(whole.model))):
        with torch.no_grad():
            assert torch.equal(whole.task.logits(model, shifted(samples, 1)), expected)


def test_nothing_is_left_where_a_merge_fails(base_model, tuned_states, samples):
    merger = merge(base_model, tuned_states, samples, 2)
    expected = logits(merger, shifted(samples, 2))
    with pytest.raises(ValueError, match="at least two"):
        merger.add(NAMES[2], tuned_states[2], samples[2].select(slice(0, 1)))
    assert torch.equal(logits(merger, shifted(samples, 2)), expected)
    assert merger.task_names == NAMES[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(2,)), "the model has 2 blocks, so 1 is the deepest"),
        (dict(depths=()), "depths=\\[\\]"),
        (dict(depths=(1, 1)), "depths=\\[1, 1\\]"),
        (dict(shrinkage=0.0), "shrinkage=0.0"),
        (dict(own_covariance=1.0), "own_covariance=1.0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(seniority=-1.0), "seniority=-1.0"),
        (dict(abstain=0.0), "abstain=0.0"),
        (dict(rank=0), "rank=0"),
    ],
)
def test_bad_options_are_refused(base_model, options, message):
    with pytest.raises(ValueError, match=message):
        mingle.Merger(base_model, "routed", **(OPTIONS | options))


def test_what_the_router_sees_of_the_base_is_not_among_the_gates_that_count(
    base_model, tuned_states, samples
):
    """Layers in front of the depth that it reads run twice, the first time without any expert."""
    merger = merge(base_model, tuned_states, samples)
    (name, layer), data, calls = next(iter(merger.method.layers.items())), shifted(samples, 1), []
    with layer.register_forward_pre_hook(lambda layer, args: calls.append(layer.gates(args[0]))):
        logits(merger, data)
    look, own = calls
    assert not look.any() and own.any()
    found = mean_gates(merger.task, merger.model, merger.method.layers, data)
    torch.testing.assert_close(found[name], own.mean(0))
    with gates_made_of({name: layer}, torch.ones_like):  # what it decides stays
        assert torch.equal(merger.method.route(data), torch.ones(len(data), dtype=torch.long))
