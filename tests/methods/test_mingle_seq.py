"""MINGLE-Seq: what an expert is made of, and on which models and samples a run merges."""

from __future__ import annotations

import pytest
import torch
from small_merges import NAMES, SETTINGS, add, everything, same_bits

import mingle
from mingle.runs.loop import experts_of, merge_all
from mingle.runs.observer import Observer
from mingle.runs.origin import origin


def chain(tuned_states):
    """Each tower goes on from the one before."""
    base = tuned_states[0]
    return [base] + [
        {k: base[k] + 0.3 * (state[k] - tuned_states[0][k]) for k in base} for state in tuned_states[1:]
    ]


def test_published_settings(base_model):
    options = mingle.Merger(base_model, "mingle-seq").options
    assert (options.steps, options.constraint, options.rank, options.k, options.lr) == (
        500,
        "hard",
        64,
        3,
        1e-4,
    )


@pytest.mark.parametrize("start", ["previous", "base"])
def test_experts_are_what_changed_since_the_start(base_model, tuned_states, samples, start):
    """Experts of full rank are the task vectors, but for the block of the expert before."""
    merger = mingle.Merger(base_model, "mingle-seq", start=start, **(SETTINGS | {"rank": 64}))
    tuned = chain(tuned_states)
    before = base_model.vision_model.state_dict()
    for i in range(2):
        add(merger, i, tuned, samples)
    for name, layer in merger.method.layers.items():
        weight = f"{name}.weight"
        origin = tuned[0][weight] if start == "previous" else before[weight]
        delta = (tuned[1][weight] - origin).double()
        U, S, Vh = torch.linalg.svd((tuned[0][weight] - before[weight]).double(), full_matrices=False)
        p = S / S.sum()
        leading = int(torch.exp(-(p * p.log()).sum()))
        U, Vh = U[:, :leading], Vh[:leading]
        expected = delta - U @ (U.T @ delta @ Vh.T) @ Vh
        found = layer.experts()[1].delta().double()
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("start", ["previous", "base"])
def test_a_saved_merge_goes_on_bit_for_bit(base_model, tuned_states, samples, tmp_path, start):
    tuned = chain(tuned_states)
    whole = mingle.Merger(base_model, "mingle-seq", start=start, **SETTINGS)
    for i in range(2):
        add(whole, i, tuned, samples)
    whole.save_pretrained(tmp_path)
    resumed = mingle.Merger.from_pretrained(tmp_path)
    assert bool(resumed.method.previous) == (start == "previous")
    for merger in (whole, resumed):
        add(merger, 2, tuned, samples)
    same_bits(everything(whole), everything(resumed))


def test_the_model_before_once_more_is_skipped(base_model, tuned_states, samples):
    merger = mingle.Merger(base_model, "mingle-seq", start="previous", **SETTINGS)
    tuned = chain(tuned_states)
    assert add(merger, 0, tuned, samples).skipped is None
    assert (
        "no target layer differs from the model it started from"
        in add(merger, 1, [None, tuned[0]], samples).skipped
    )
    assert add(merger, 2, tuned, samples).skipped is None


@pytest.mark.parametrize("method", ["mingle-seq", "mingle", "average"])
def test_a_run_asks_for_chains_and_whole_training_data(base_model, tuned_states, samples, method):
    asked = []

    class Recording(dict):
        def seeds(self, name, *, whole=False):
            asked.append(("seeds", name, whole))
            return samples[NAMES.index(name)]

        def shortage(self, name):
            return ""

        def expert(self, name, after=()):
            asked.append(("expert", name, tuple(after)))
            return tuned_states[NAMES.index(name)]

    suite = Recording(zip(NAMES, samples, strict=True))
    sequential = method == "mingle-seq"
    merger = mingle.Merger(base_model, method, **({} if method == "average" else SETTINGS))
    merger.metadata = origin()
    list(merge_all(merger, NAMES, experts_of(suite, sequential=sequential), suite, Observer()))
    expected = []
    for i, name in enumerate(NAMES):
        # Methods that adapt on no samples measure their heads on them.
        expected += [("seeds", name, sequential), ("expert", name, tuple(NAMES[:i]) if sequential else ())]
    assert asked == expected
