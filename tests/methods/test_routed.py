"""Routed experts: the router against dense formulas, and the merged model against every task's own expert."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small_merges import NAMES, same_bits

import mingle
from mingle.methods.router import FeatureStatistics, GaussianRouter
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


def test_scores_are_the_blended_gaussians_log_likelihoods(clouds):
    router = GaussianRouter([FeatureStatistics.of(x) for x in clouds], own=0.2, shrinkage=0.05)
    covariances = [torch.cov(x.T)[:6, :6] for x in clouds]
    deviation = torch.stack([c.diagonal() for c in covariances]).mean(0).sqrt()
    scaled = [c / deviation / deviation[:, None] for c in covariances]
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = []
    for i, features in enumerate(clouds):
        Q = 0.95 * (0.8 * sum(scaled) / 3 + 0.2 * scaled[i]) + 0.05 * torch.eye(6, dtype=torch.float64)
        z = (x - features.mean(0))[:, :6] / deviation
        expected.append(-0.5 * ((z @ Q.inverse() * z).sum(1) + torch.logdet(Q)))
        squares = (x - features.mean(0))[:, :6].square() / features.var(0)[:6]
        torch.testing.assert_close(router.strangeness(x, torch.full((4,), i)), squares.mean(1))
        own = router.strangeness(features, torch.full((len(features),), i))
        torch.testing.assert_close(own.sum() / (len(features) - 1), torch.tensor(1.0, dtype=torch.float64))
    expected = torch.stack(expected, 1)
    got = router.scores(x)
    torch.testing.assert_close(got - got[:, :1], expected - expected[:, :1])


def test_statistics_refuse_what_says_nothing(clouds):
    with pytest.raises(ValueError, match="1 seed samples: a router needs at least two"):
        FeatureStatistics.of(clouds[0][:1])
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(clouds[0] * float("nan"))


def test_features_that_never_vary_say_nothing(clouds):
    router = GaussianRouter([FeatureStatistics.of(torch.ones(4, 3)), FeatureStatistics.of(torch.zeros(4, 3))])
    assert torch.equal(*router.scores(torch.ones(2, 3)).unbind(1))
    assert torch.equal(
        router.strangeness(torch.ones(2, 3), torch.tensor([0, 1])), torch.zeros(2, dtype=torch.float64)
    )


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
    router = merge(base_model, tuned_states, samples).method.router
    means = router.router.means
    assert torch.equal(router.gates(means), torch.eye(3))
    assert torch.equal(router.gates(means + 10 * router.router.variances.sum(0).sqrt()), torch.zeros(3, 3))
    all_far = merge(base_model, tuned_states, samples, abstain=1e-9)
    expected = all_far.task.logits(base_model, shifted(samples, 1))
    torch.testing.assert_close(logits(all_far, shifted(samples, 1)), expected, rtol=1e-5, atol=1e-5)


def test_soft_gates_are_the_posterior(base_model, tuned_states, samples):
    router = merge(base_model, tuned_states, samples, gates="soft", seniority=2.0, abstain=None).method.router
    features = torch.randn(5, 2 * 2 * 32) * 0.3
    expected = torch.softmax(router.router.scores(features) + torch.tensor([4.0, 2.0, 0.0]), 1)
    torch.testing.assert_close(router.gates(features), expected.float())


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
        (dict(seniority=-1.0), "seniority=-1.0"),
        (dict(abstain=0.0), "abstain=0.0"),
        (dict(rank=0), "rank=0"),
    ],
)
def test_bad_options_are_refused(base_model, options, message):
    with pytest.raises(ValueError, match=message):
        mingle.Merger(base_model, "routed", **(OPTIONS | options))
