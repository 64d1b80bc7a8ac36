"""One merge by several processes: each has a share of samples and layers, and all have the same merger."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from classifiers import NAMES as CLASSES
from classifiers import inputs, made, tuned
from small_merges import NAMES, SETTINGS, everything, same_bits
from tiny_decoders import CONFIGS, built, prompts
from tiny_decoders import tuned as tuned_decoder
from tiny_merge import contents
from worlds import world

import mingle
from mingle import ranks
from mingle.adaptation.divergence import AdaptationDiverged
from mingle.tasks import TaskData
from mingle.tasks.clip import ClipTask
from mingle.tasks.shares import by_batches

#: Steps take 7 of 24 samples, which no number of processes can share evenly, or 2, which leave some without
#: any.
MERGES = {
    "mingle": dict(batch_size=7),
    "mingle, few": dict(batch_size=2, lr="auto"),
    "mingle, batch gates": dict(reduce="batch", lr="auto"),
    "mingle, all gates": dict(gates="all", reduce="token", constraint="hard"),
    "mingle-routed": {},
    "routed": {},
    "wemoe": dict(later_rank=2),
    "adamerging": dict(lr=1e-2, batch_size=7),
}
#: numbers that are sums over samples, whose order differs
LEARNT = ("gate_weight", "gate_bias", "basis", "merged", "mean", "factor", "losses", "strange")


def merged(base_model, tuned_states, samples, kind):
    """Of a merge of two: all that is kept, the traces, the temperatures and the accuracies."""
    method = kind.split(",")[0]
    known = mingle.methods.get(method).Options.__dataclass_fields__
    settings = {name: value for name, value in (SETTINGS | {"steps": 4}).items() if name in known}
    model = copy.deepcopy(base_model)
    if method == "adamerging":  # key biases have no gradient but rounding errors
        model = model.double()
    place = next(model.parameters())
    data = [
        TaskData(
            {"pixel_values": each.inputs["pixel_values"].to(place)},
            {"text_embeds": each.shared["text_embeds"].to(place)},
            each.labels,
        )
        for each in samples
    ]
    merger, traces = mingle.Merger(model, method, **(settings | MERGES[kind])), []
    for name, state, each in zip(NAMES[:2], tuned_states, data, strict=False):
        report = merger.add(name, state, TaskData(each.inputs, each.shared))
        trace = report.trace
        traces.append(None if trace is None else (trace.loss, trace.interference, trace.strength))
    result = merger.evaluate(dict(zip(NAMES[:2], data, strict=False)), batch_size=5)
    kept = merger.method.state_tensors()
    for i in range(2):
        kept |= {f"{i}/{name}": tensor for name, tensor in merger.method.task_tensors(i).items()}
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    return kept, traces, [task.temperature for task in merger.merged], result


def check(found, alone):
    """All processes have the same bits, and those of one process up to the order of sums."""
    kept, traces, temperatures, result = found[0]
    for other in found[1:]:
        same_bits(other[0], kept)
        assert other[1:] == (traces, temperatures, result)
    assert result == alone[3]
    assert temperatures == pytest.approx(alone[2], rel=1e-5)
    assert kept.keys() == alone[0].keys()
    for part in LEARNT:
        pair = [
            torch.cat([tensors[name].double().flatten() for name in kept if part in name] or [torch.ones(1)])
            for tensors in (kept, alone[0])
        ]
        assert (pair[0] - pair[1]).norm() <= 1e-5 * pair[1].norm(), part
    for name in kept:
        if not any(part in name for part in LEARNT):  # experts, and numbers of samples
            assert torch.equal(kept[name], alone[0][name]), name
    for mine, theirs in zip(traces, alone[1], strict=True):
        if mine is not None:
            assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
            assert mine[1].keys() == theirs[1].keys()


@pytest.mark.parametrize(
    ("size", "kinds"),
    [
        (3, ["mingle", "mingle, few", "mingle, batch gates"]),
        pytest.param(2, list(MERGES)[3:], marks=pytest.mark.slow),
        pytest.param(4, ["mingle", "mingle-routed"], marks=pytest.mark.slow),
    ],
)
def test_all_have_the_same_merger_which_is_that_of_one_process(
    base_model, tuned_states, samples, size, kinds
):
    make = partial(merged, base_model, tuned_states, samples)
    found = told(world(size, lambda: [make(kind) for kind in kinds], seconds=150))
    for kind, each in zip(kinds, zip(*found, strict=True), strict=True):
        check(each, make(kind))


def told(found):
    """What all returned; what one raised is raised here."""
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def test_texts_are_evaluated_as_by_one_process():
    """Of different lengths, and with the task to be found; three batches for two processes."""

    def work():
        base = made("bert")
        merger = mingle.Merger(base, "average")
        suite = {}
        for number, names in enumerate(CLASSES):
            merger.add(f"task {number}", tuned(base, names, number + 1), inputs(base, seed=number))
            data = {key: rows.flip(0) for key, rows in inputs(base, 11, seed=22 + number).items()}
            suite[f"task {number}"] = {**data, "labels": torch.arange(11) % 2}
        order = by_batches(merger.task.data(data), 4, lambda batch: batch.inputs["input_ids"].tolist())
        return merger.evaluate(suite, batch_size=4), order

    alone = work()
    assert told(world(2, work)) == [alone, alone]
    assert 0 < alone[0].acc_unknown < 100 and len(alone[1]) == 3


def test_the_loss_of_a_decoder_is_the_mean_over_all_tokens_that_count():
    """Processes have samples of different numbers of tokens, and some have none that count."""

    def work():
        base = built(CONFIGS["llama"]())
        merger = mingle.Merger(base, "mingle", rank=4, steps=3, lr=0.1, batch_size=5)
        seeds = prompts("llama", 0)
        seeds["answer_mask"] = seeds["attention_mask"].clone()
        seeds["answer_mask"][:, :6] = 0
        seeds["answer_mask"][:2] = 0
        merger.add("one", tuned_decoder(base, 1), seeds)
        return everything(merger)

    alone, (mine, other) = work(), told(world(2, work))
    same_bits(mine, other)
    for part in ("gate_weight", "basis"):
        pair = [
            torch.cat([tensors[name].flatten() for name in alone if part in name])
            for tensors in (mine, alone)
        ]
        assert (pair[0] - pair[1]).norm() <= 1e-5 * pair[1].norm()


@pytest.mark.parametrize("name", ["llama", "mt5"])
def test_each_process_has_the_teacher_answer_some_samples(name):
    def work():
        base = built(CONFIGS[name]())
        task, asked = mingle.tasks.of(base), []
        generate = base.generate
        base.generate = lambda **given: asked.append(len(given["input_ids"])) or generate(**given)
        found = task.prepared(lambda: base, task.data(prompts(name, 0, 5)))
        return dict(found.inputs), sum(asked)

    alone, found = work(), told(world(3, work))
    assert alone[1] == 5 and [asked for _, asked in found] == [1, 2, 2]
    for given, _ in found:
        same_bits(given, alone[0])


def test_the_first_writes_and_errors_of_one_are_errors_of_all(
    base_model, tuned_states, samples, tmp_path, monkeypatch
):
    def add(merger, i):
        return merger.add(NAMES[i], tuned_states[i], TaskData(samples[i].inputs, samples[i].shared))

    def work():
        merger = mingle.Merger(base_model, "mingle", **SETTINGS | {"steps": 2})
        add(merger, 0)
        merger.save_pretrained(tmp_path / f"of {ranks.size()}")
        assert (tmp_path / f"of {ranks.size()}" / "manifest.json").exists()  # on all, when it returns
        if ranks.size() == 1:
            return
        before = everything(merger)
        if ranks.rank() == 1:
            monkeypatch.setattr(ClipTask, "logits", broken)
        try:
            add(merger, 1)
        finally:
            same_bits(everything(merger), before)
            assert merger.task_names == NAMES[:1]

    def broken(*_):
        raise OSError("image 7 cannot be read")

    work()
    first, second = world(2, work)
    assert isinstance(second, OSError) and isinstance(first, ranks.OtherRankFailed), (first, second)
    assert "rank 1" in str(first) and "merging task 'two': image 7 cannot be read" in str(first)
    alone, shared = (contents(tmp_path / f"of {size}") for size in (1, 2))
    assert len(alone) == len(shared)  # whose names tell what is in them


def test_an_adaptation_that_stops_stops_everywhere(base_model, tuned_states, samples, monkeypatch):
    """Where one process has an answer that is not finite, the loss of all is not."""

    def work():
        if ranks.rank() == 1:
            monkeypatch.setattr(ClipTask, "logits", endless)
        merger = mingle.Merger(base_model, "mingle", **SETTINGS)
        merger.add("one", tuned_states[0], TaskData(samples[0].inputs, samples[0].shared))

    def endless(task, model, data, real=ClipTask.logits):
        return real(task, model, data) * math.inf

    found = world(2, work)
    assert any(isinstance(each, AdaptationDiverged) for each in found)
    assert all("was not finite for 3 steps" in str(each) for each in found), found
