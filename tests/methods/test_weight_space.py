"""Every weight-space method against its formula, re-computed plainly on hand-sized towers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import mingle
from mingle.methods import METHODS, get, ties
from mingle.methods.gated import GatedMethod
from mingle.methods.magmax import larger
from mingle.methods.opcm import split_rank

CONTRACT = {
    "pre-trained",
    "individual",
    "average",
    "task-arithmetic",
    "ties",
    "magmax",
    "consensus-ta",
    "opcm",
    "tsv-m",
    "iso-c",
    "wudi",
    "adamerging",
    "wemoe",
    "nufilt",
    "mingle",
    "mingle-light",
    "mingle-routed",
    "mingle-seq",
    "made-it",
    "mass",
    "routed",
}
DATA_FREE = [name for name, method in METHODS.items() if not method.needs_seeds]
PLAIN = [name for name in DATA_FREE if not issubclass(METHODS[name], GatedMethod)]


def merged_tower(merger):
    return {name: tensor.double() for name, tensor in merger.model.vision_model.state_dict().items()}


def wide(state):
    return {name: tensor.double() for name, tensor in state.items()}


def run(base_model, method, tuned, **options):
    merger = mingle.Merger(base_model, method, **options)
    for i, state in enumerate(tuned):
        merger.add(f"task{i}", state)
    return merged_tower(merger)


def assert_same(got, expected, tolerance=2e-6):
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_average(base_model, tuned_states):
    states = [wide(s) for s in tuned_states]
    assert_same(
        run(base_model, "average", tuned_states), {k: sum(s[k] for s in states) / 3 for k in states[0]}
    )


def test_task_arithmetic(base_model, tuned_states):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    expected = {k: base[k] + 0.2 * sum(s[k] - base[k] for s in states) for k in base}
    assert_same(run(base_model, "task-arithmetic", tuned_states, scaling=0.2), expected)


def plain_ties(M, delta, density):
    """TIES of two vectors, entry by entry."""
    kept = []
    for vector in (M, delta):
        ranked = sorted((abs(x) for t in vector.values() for x in t.flatten().tolist()), reverse=True)
        limit = ranked[int(density * len(ranked)) - 1]
        kept.append({k: torch.where(t.abs() >= limit, t, 0) for k, t in vector.items()})
    merged = {}
    for k in M:
        a, b = kept[0][k], kept[1][k]
        positive = (a + b) > 0
        merged[k] = torch.where(positive, a.clamp(min=0) + b.clamp(min=0), a.clamp(max=0) + b.clamp(max=0))
        merged[k][a + b == 0] = 0
    return merged


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.0}),
        ("ties", {"density": 1.5}),
        ("opcm", {"alpha": -1.0}),
        ("opcm", {"alpha": 2.0}),
    ],
)
def test_shares_are_no_more_than_all_and_no_less_than_none(method, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}=.*: expected a value in"):
        get(method).Options(**options)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties(base_model, tuned_states, density):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    M = {k: torch.zeros_like(v) for k, v in base.items()}
    for t, state in enumerate(states):
        delta = {k: state[k] - base[k] for k in base}
        v = delta if t == 0 else plain_ties(M, delta, density)
        M = {k: M[k] + 0.3 * v[k] for k in base}
    assert_same(run(base_model, "ties", tuned_states, density=density), {k: base[k] + M[k] for k in base})


def test_ties_keeps_all_of_equal_magnitude_and_drops_what_cancels():
    first = {"a": torch.tensor([3.0, -2.0, 2.0, 1.0, 0.0]), "b": torch.tensor([4.0, -1.0, 0.5, 0.0, 0.0])}
    second = {"a": torch.tensor([-3.0, -5.0, 1.0, 1.0, 0.0]), "b": torch.tensor([6.0, 0.0, 0.0, 0.0, 0.0])}
    assert ties.trim_threshold(first, 0.3) == 2
    assert ties.trim_threshold(first, 0.05) == math.inf
    limits = [ties.trim_threshold(vector, 0.3) for vector in (first, second)]
    assert limits == [2, 3]  # first keeps four entries, as two are equal
    merged = {name: ties.ties((first[name], second[name]), limits) for name in first}
    assert merged["a"].tolist() == [0, -7, 2, 0, 0]
    assert merged["b"].tolist() == [10, 0, 0, 0, 0]


def test_magmax(base_model, tuned_states):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    expected = {}
    for k, b in base.items():
        deltas = torch.stack([s[k] - b for s in states])
        expected[k] = b + 0.5 * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]
    assert_same(run(base_model, "magmax", tuned_states), expected)


def test_magmax_keeps_the_older_of_two_equally_large_entries():
    first, second = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-1.0, 3.0, 0.0])
    assert larger(first, second).tolist() == [1, 3, 0]


@pytest.mark.parametrize(("masks", "min_masks"), [("newest", 1), ("newest", 2), ("all", 2), ("all", 3)])
def test_consensus_ta(base_model, tuned_states, masks, min_masks):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    options = dict(scaling=0.5, threshold=0.9, masks=masks, min_masks=min_masks)
    merged = run(base_model, "consensus-ta", tuned_states, **options)
    for k, b in base.items():
        theta, active = b, [torch.ones_like(b)]
        for t, state in enumerate(states):
            M, delta = theta - b, state[k] - b
            if t == 0:
                theta = theta + 0.5 * delta
                continue
            mask = (delta.abs() > 0.9 * (b + M + delta - state[k]).abs()).double()
            active = [*active, mask] if masks == "all" else [active[0], mask]
            theta = theta + 0.5 * (sum(active) >= min_masks) * (M + delta)
        assert (merged[k] - theta).norm() <= 2e-6 * theta.norm(), k


def test_consensus_ta_masks_of_the_newest_task_and_of_all_differ(base_model, tuned_states):
    of = [
        run(base_model, "consensus-ta", tuned_states, scaling=0.5, threshold=0.9, masks=masks)
        for masks in ("newest", "all")
    ]
    assert any(not torch.equal(of[0][k], of[1][k]) for k in of[0])


@pytest.mark.parametrize("drop_diagonal", [False, True])
def test_opcm(base_model, tuned_states, drop_diagonal):
    base, states = wide(base_model.vision_model.state_dict()), [wide(s) for s in tuned_states]
    linear = {
        f"{n}.weight" for n, m in base_model.vision_model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert len(linear) == 12
    M, scale, norms = None, 1.0, []
    for state in states:
        delta = {k: state[k] - base[k] for k in base}
        norms.append(math.sqrt(sum(float(d.square().sum()) for d in delta.values())))
        if M is None:
            M = delta
            continue
        raw = {}
        for k, d in delta.items():
            if k in linear:
                U, S, Vh = torch.linalg.svd(M[k], full_matrices=True)
                cumulative = S.cumsum(0) / S.sum()
                s = next(i for i, c in enumerate(cumulative.tolist()) if c > 0.5)
                C = U.T @ d @ Vh.T
                C[:s, :s] = 0
                if drop_diagonal:
                    C.diagonal().zero_()
                d = U @ C @ Vh
            raw[k] = scale * M[k] + d
        mean = sum(norms) / len(norms)
        scale = math.sqrt(sum(float(r.square().sum()) for r in raw.values())) / mean
        M = {k: r / scale for k, r in raw.items()}
    assert_same(
        run(base_model, "opcm", tuned_states, drop_diagonal=drop_diagonal), {k: base[k] + M[k] for k in base}
    )


def test_opcm_split_rank():
    assert split_rank(torch.tensor([5.0, 3.0, 2.0]), 0.5) == 1
    assert split_rank(torch.tensor([6.0, 3.0, 1.0]), 0.5) == 0
    assert split_rank(torch.ones(4), 0.5) == 2


@pytest.mark.parametrize("method", DATA_FREE)
def test_a_task_equal_to_the_base_and_an_interruption(base_model, tuned_states, method, tmp_path):
    """The same bits whether the merge stops after two tasks, one of them equal to the base, or not; all of
    them finite.
    """
    arrivals = [tuned_states[0], base_model.vision_model.state_dict(), tuned_states[1]]
    whole = run(base_model, method, arrivals)
    assert all(tensor.isfinite().all() for tensor in whole.values())
    merger = mingle.Merger(base_model, method)
    for i in range(2):
        merger.add(f"task{i}", arrivals[i])
    merger.save_pretrained(tmp_path)
    merger = mingle.Merger.from_pretrained(tmp_path)
    merger.add("task2", arrivals[2])
    assert_same(merged_tower(merger), whole, tolerance=0)


def test_consensus_ta_counts_masks_across_an_interruption(base_model, tuned_states, tmp_path):
    options = dict(scaling=0.5, threshold=0.9, masks="all", min_masks=3)
    whole = run(base_model, "consensus-ta", tuned_states, **options)
    merger = mingle.Merger(base_model, "consensus-ta", **options)
    for i in range(2):
        merger.add(f"task{i}", tuned_states[i])
    merger.save_pretrained(tmp_path)
    counts = merger.method.state
    merger = mingle.Merger.from_pretrained(tmp_path)
    assert {tuple(count.unique().tolist()) for count in counts.values()} <= {(1,), (2,), (1, 2)}
    assert all(torch.equal(merger.method.state[k], count) for k, count in counts.items())
    merger.add("task2", tuned_states[2])
    assert_same(merged_tower(merger), whole, tolerance=0)


@pytest.mark.parametrize("method", PLAIN)
def test_half_precision_towers_stay_in_theirs(base_model, tuned_states, method):
    """Merged in float32 from what bfloat16 holds, and rounded once per task."""
    half = copy.deepcopy(base_model).to(torch.bfloat16)
    states = [{k: v.to(torch.bfloat16) for k, v in s.items()} for s in tuned_states[:2]]
    merger = mingle.Merger(half, method)
    for i, state in enumerate(states):
        merger.add(f"task{i}", state)
    assert {tensor.dtype for tensor in merger.model.state_dict().values()} == {torch.bfloat16}
    if method not in ("pre-trained", "individual", "nufilt", "iso-c"):  # Iso-C enlarges the smallest
        wider = run(half.float(), method, [{k: v.float() for k, v in s.items()} for s in states])
        assert_same(merged_tower(merger), wider, tolerance=2e-2)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "magmax", "consensus-ta", "nufilt"])
def test_a_first_task_equal_to_the_base_leaves_the_base(base_model, method):
    base = base_model.vision_model.state_dict()
    assert_same(run(base_model, method, [base]), wide(base), tolerance=0)


@pytest.mark.parametrize("method", DATA_FREE)
def test_seeds_change_nothing_that_methods_without_data_merge(base_model, tuned_states, samples, method):
    without, given = (mingle.Merger(base_model, method) for _ in range(2))
    for i in range(2):
        without.add(f"task{i}", tuned_states[i])
        given.add(f"task{i}", tuned_states[i], samples[i])
    assert given.merged[1].seed_samples == 0
    assert_same(given.model.state_dict(), without.model.state_dict(), tolerance=0)


def test_reference_rows(base_model, tuned_states):
    base = wide(base_model.vision_model.state_dict())
    assert_same(run(base_model, "pre-trained", tuned_states), base, tolerance=0)
    merger = mingle.Merger(base_model, "individual")
    for i, state in enumerate(tuned_states):
        merger.add(f"task{i}", state)
    for i, state in enumerate(tuned_states):
        merger.model_for(f"task{i}")
        assert_same(merged_tower(merger), wide(state), tolerance=0)


def test_unknown_names_and_options_are_refused_with_the_nearest_known_one(base_model):
    assert set(METHODS) <= CONTRACT
    assert all(method.name == name for name, method in METHODS.items())
    with pytest.raises(ValueError, match="unknown method 'minge'; did you mean 'mingle'"):
        get("minge")
    with pytest.raises(ValueError, match="unknown option 'gama'; did you mean 'gamma'"):
        mingle.Merger(base_model, "mingle", gama=1.0)
    with pytest.raises(ValueError, match="rank: 'many' is not of type int"):
        mingle.Merger(base_model, "mingle", rank="many")
    with pytest.raises(ValueError, match="rank=0"):
        mingle.Merger(base_model, "mingle", rank=0)
    for method, option in (
        ("ties", "density"),
        ("magmax", "scaling"),
        ("consensus-ta", "min_masks"),
        ("adamerging", "batch_size"),
    ):
        with pytest.raises(ValueError, match=f"method '{method}': {option}=0"):
            mingle.Merger(base_model, method, **{option: 0})
