"""A merged model asked for single answers, with all of its tasks and with some of them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import played_merges
import pytest
import torch
from PIL import Image
from played_merges import CLASSES, TASKS
from tiny_merge import contents

from mingle.io.files import CheckpointError
from mingle.merging.merger import Merger
from mingle.methods.gated import GatedMethod
from mingle.methods.routing import RouterMethod
from mingle.nn.observe import observed
from mingle.options import OptionError
from mingle.runs.play import try_out as try_out_module
from mingle.runs.play.try_out import TryOut
from mingle.tasks import TaskType
from mingle.tasks.readers import ReadingError
from mingle.tasks.seq2seq import Seq2SeqTask

METHODS = [name for name in played_merges.OPTIONS if name not in ("individual", "pre-trained")]
GATED = [name for name in METHODS if name != "average"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A function that gives a saved merge of image classifiers by its method."""
    folders: dict[str, Path] = {}

    def saved(method: str) -> Path:
        if method not in folders:
            place = tmp_path_factory.mktemp(method)
            torch.manual_seed(0)
            played_merges.classifier(place, "vit", method).save_pretrained(place / "merged")
            folders[method] = place / "merged"
        return folders[method]

    return saved


def first(answer):
    best = answer.classes[0]
    return best.task, best.label, pytest.approx(best.probability, abs=1e-6)


def by_hand(model, task, try_out, given):
    """The probabilities of the classes of a task, from a pass of its own with the task's head."""
    merger = try_out.merger
    served = merger.model_for(task)
    head = {name: served.state_dict()[name] for name in merger.merged[0].tensors}
    state = model.state_dict() | head
    with torch.no_grad():
        logits = torch.func.functional_call(model, state, (), try_out.reader(given)).logits
    return logits[0].softmax(0).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_with_all_tasks_it_is_the_answer_of_predict(vit, picture, method):
    try_out = TryOut.of(vit(method))
    trial = try_out.trial(picture, TASKS)
    found = try_out.merger.predict(try_out.reader(picture))
    assert first(trial.merged) == (found.task[0], found.label[0], found.score[0])
    shares = [each.probability for each in trial.merged.classes]
    assert shares == sorted(shares, reverse=True)
    if isinstance(try_out.merger.method, RouterMethod):
        assert sum(trial.routing.shares.values()) == pytest.approx(1)
        assert max(trial.routing.shares, key=trial.routing.shares.get) == found.task[0]
        assert {each.task for each in trial.merged.classes} == {found.task[0]}
    else:
        assert len(shares) == 5 and "has no router: the likeliest of all classes" in trial.routing.reason


@pytest.mark.parametrize("method", METHODS)
def test_a_task_that_is_switched_off_answers_nothing_and_its_expert_is_still(vit, picture, method):
    folder = vit(method)
    before = contents(folder)
    try_out = TryOut.of(folder)
    whole = try_out.trial(picture, TASKS)
    for place, kept in enumerate(TASKS):
        trial = try_out.trial(picture, [kept])
        for answer in (trial.merged, trial.base):
            assert {(each.task, each.label) for each in answer.classes} == {(kept, c) for c in CLASSES[place]}
        if isinstance(try_out.merger.method, RouterMethod):
            assert trial.routing.shares == {kept: 1}
        if method in GATED:
            column = [row[1 - place] for row in trial.gates.values]
            shared = method == "made-it"  # tasks may have one expert together
            assert all(value == 0 or (shared and value == 1) for value in column) and 0 in column
            assert any(row[place] for row in trial.gates.values)
    assert try_out.trial(picture, TASKS) == whole
    assert contents(folder) == before
    if method in ("mingle", "wemoe"):  # no router, which gives gates anew at every call
        assert all(layer.given_gates is None for layer in try_out.merger.method.layers.values())


@pytest.mark.parametrize("method", [name for name in GATED if name != "made-it"])
def test_what_answers_is_the_model_without_the_others_experts(vit, picture, method):
    """The same as a model from which the experts of the other task were really taken."""
    try_out = TryOut.of(vit(method))
    trial = try_out.trial(picture, [TASKS[1]])
    other = Merger.from_pretrained(vit(method))
    gated = other.method
    assert isinstance(gated, GatedMethod)
    for layer in gated.layers.values():
        layer.set_expert(0, 0 * layer.A[0], 0 * layer.B[0])
    if isinstance(gated, RouterMethod):
        gated.router.router.among = torch.tensor([False, True])
    shares = by_hand(other.model, TASKS[1], try_out, picture)
    temperatures = [other.merged[1].temperature]
    logits = torch.tensor(shares).log() / temperatures[0]
    best = logits.softmax(0).max().item()
    assert trial.merged.classes[0].probability == pytest.approx(best, abs=1e-5)


def test_a_softmax_of_alignments_is_one_over_the_active_tasks(vit, picture):
    try_out = TryOut.of(vit("made-it"))
    both = torch.tensor(try_out.trial(picture, TASKS).gates.values)
    owned = try_out.merger.method.owned
    apart = [number for number, places in enumerate(owned.values()) if places[0] != places[1]]
    assert apart
    assert torch.allclose(both[apart].sum(1), torch.ones(len(apart), dtype=both.dtype))
    alone = torch.tensor(try_out.trial(picture, [TASKS[0]]).gates.values)
    assert torch.allclose(alone[apart], torch.tensor([1.0, 0.0], dtype=alone.dtype).expand(len(apart), 2))


@pytest.mark.parametrize("method", GATED)
def test_an_expert_alone_is_the_base_with_its_update_in_the_weights(vit, picture, method):
    try_out = TryOut.of(vit(method))
    merger = try_out.merger
    trial = try_out.trial(picture, [])
    for place, name in enumerate(TASKS):
        folded = Merger.from_pretrained(vit(method)).base
        tower = folded.get_submodule(merger.task.tower(folded))
        tower.load_state_dict(merger.method.folded(place, None).tower, strict=False)
        shares = by_hand(folded, name, try_out, picture)
        answer = trial.experts[name]
        assert [each.label for each in answer.classes] == [
            CLASSES[place][c] for c in sorted(range(len(shares)), key=lambda c: -shares[c])
        ]
        assert answer.classes[0].probability == pytest.approx(max(shares), abs=1e-5)


def test_the_base_answers_with_the_heads_of_the_active_tasks(vit, picture):
    try_out = TryOut.of(vit("average"))
    trial = try_out.trial(picture, TASKS)
    shares = [by_hand(try_out.merger.base, name, try_out, picture) for name in TASKS]
    best = max(max(part) for part in shares)
    assert trial.base.classes[0].probability == pytest.approx(best, abs=1e-6)
    assert {answer.reason for answer in trial.experts.values()} == {
        "method 'average' keeps no expert of a task"
    }
    assert "has no gates" in trial.gates.reason


@pytest.mark.parametrize("method", ["mingle", "mingle-routed", "routed"])
def test_gates_are_those_of_the_answer_and_not_of_the_router_s_look_at_the_base(vit, picture, method):
    """The router of `routed` looks behind the first of two blocks: their layers are called more than once."""
    try_out = TryOut.of(vit(method))
    merger, last = try_out.merger, {}

    def note(name, layer, x):
        gates = layer.gates(x)
        if gates.dim() > 1:  # and not 0 for all samples, as in the router's look
            last[name] = gates.double().flatten(0, -2).mean(0)

    with observed(merger.method.layers, note), torch.no_grad():
        merger.task.logits(merger.model, merger.task.data(try_out.reader(picture)))
    found = try_out.trial(picture, TASKS).gates
    assert found.layers == tuple(last) and found.tasks == TASKS
    assert torch.allclose(torch.tensor(found.values).double(), torch.stack(list(last.values())))
    if method == "routed":
        shares = [*try_out.trial(picture, TASKS).routing.shares.values()]
        assert all(row == pytest.approx(shares, abs=1e-6) for row in found.values)


def test_a_strange_input_is_left_to_the_base(vit, picture, monkeypatch):
    try_out = TryOut.of(vit("routed"))
    monkeypatch.setattr(try_out.merger.method.router.router, "limits", torch.zeros(2))
    trial = try_out.trial(picture, TASKS)
    likeliest = max(trial.routing.shares, key=trial.routing.shares.get)
    assert trial.routing.strange
    assert not any(map(any, trial.gates.values))
    place = TASKS.index(likeliest)
    shares = by_hand(try_out.merger.base, likeliest, try_out, picture)
    assert first(trial.merged)[:2] == (likeliest, CLASSES[place][shares.index(max(shares))])


@pytest.mark.parametrize("method", ["average", "individual", "routed"])
def test_without_any_task_there_is_nothing_to_choose_from(vit, picture, method):
    trial = TryOut.of(vit(method)).trial(picture, [])
    assert not trial.base.classes and "no task is active" in trial.base.reason
    assert not trial.merged.classes and trial.merged.reason


def test_individual_models_answer_each_for_themselves(vit, picture):
    try_out = TryOut.of(vit("individual"))
    trial = try_out.trial(picture, TASKS)
    assert "one model per task" in trial.merged.reason
    for place, name in enumerate(TASKS):
        shares = by_hand(try_out.merger.model_for(name), name, try_out, picture)
        label = CLASSES[place][shares.index(max(shares))]
        assert first(trial.experts[name]) == (name, label, max(shares))


def test_the_same_input_is_not_computed_again_for_what_cannot_change(vit, picture):
    try_out = TryOut.of(vit("mingle"))
    calls = []
    try_out.merger.model.register_forward_hook(lambda *_: calls.append(1))
    try_out.trial(picture, TASKS)
    assert len(calls) == 2 + 2  # the merged model with two heads, and two experts
    try_out.trial(picture, [TASKS[0]])
    assert len(calls) == 4 + 1


def test_trials_come_one_model_at_a_time(vit, picture):
    found = list(TryOut.of(vit("routed")).trials(picture, TASKS))
    assert [(each.base is not None, len(each.experts)) for each in found] == [
        (False, 0), (True, 0), (True, 1), (True, 2)
    ]  # fmt: skip
    assert {each.merged for each in found} == {found[0].merged}


def test_several_threads_may_ask(vit, picture):
    try_out = TryOut.of(vit("routed"))
    asked = [TASKS, TASKS[:1], TASKS[1:], ()] * 2
    expected = [try_out.trial(picture, active) for active in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda active: try_out.trial(picture, active), asked)) == expected


def test_texts_are_classified(tmp_path):
    played_merges.classifier(tmp_path, "bert", "mingle").save_pretrained(tmp_path / "merged")
    try_out = TryOut.of(tmp_path / "merged")
    assert try_out.modality == "text" and not try_out.fixed
    trial = try_out.trial("a text", TASKS)
    found = try_out.merger.predict(try_out.reader("a text"))
    assert first(trial.merged) == (found.task[0], found.label[0], found.score[0])
    with pytest.raises(ReadingError, match="there is no text yet"):
        try_out.trial(" \n", TASKS)
    with pytest.raises(ReadingError, match=r"has 40 tokens, and the model has room for 22"):
        try_out.trial("a" * 40, TASKS)
    with pytest.raises(ValueError, match="task 'x' is not among the merged ones"):
        try_out.trial("a text", ["x"])


@pytest.mark.parametrize("method", ["average", "routed"])
def test_sentences_are_compared_with_the_names_of_the_active_tasks_classes(tmp_path, method):
    played_merges.sentences(tmp_path, method).save_pretrained(tmp_path / "merged")
    try_out = TryOut.of(tmp_path / "merged")
    found = try_out.merger.predict(try_out.reader("a red dog"))
    assert first(try_out.trial("a red dog", TASKS).merged) == (found.task[0], found.label[0], found.score[0])
    trial = try_out.trial("a red dog", TASKS[1:])
    assert {each.label for each in trial.merged.classes} == set(CLASSES[1])
    assert sum(each.probability for each in trial.merged.classes) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "average"),
        ("llama", "routed"),
        ("mt5", "routed"),
        *(pytest.param(kind, "mingle", marks=pytest.mark.slow) for kind in ("llama", "mt5")),
    ],
)
def test_writers_answer_in_text(tmp_path, kind, method, monkeypatch):
    monkeypatch.setattr(try_out_module, "ANSWER_TOKENS", 6)
    played_merges.writers(tmp_path, kind, method).save_pretrained(tmp_path / "merged")
    try_out = TryOut.of(tmp_path / "merged")
    merger = try_out.merger
    trial = try_out.trial("is this it?", TASKS)
    inputs = try_out.reader("is this it?")
    tokens = merger.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    tokens = tokens[1:] if kind == "mt5" else tokens[inputs["input_ids"].shape[1] :]
    assert trial.merged.text and trial.merged.text == try_out.reader.decode(tokens)
    assert trial.base.text and trial.base.text != trial.merged.text
    assert (try_out.fixed == "") == (method != "average")
    if method == "average":
        return
    assert {trial.experts[name].text for name in TASKS} != {trial.merged.text}
    assert all(map(math.isfinite, (value for row in trial.gates.values for value in row)))
    for place, name in enumerate(TASKS):
        assert try_out.trial("is this it?", []).merged.text == trial.base.text
        alone = try_out.trial("is this it?", [name])
        assert not any(row[1 - place] for row in alone.gates.values)
    if method == "routed":
        assert [try_out.trial("is this it?", [name]).merged.text for name in TASKS] == [
            trial.experts[name].text for name in TASKS
        ]


def test_a_prompt_leaves_room_for_the_answer(tmp_path):
    played_merges.writers(tmp_path, "llama", "average").save_pretrained(tmp_path / "merged")
    try_out = TryOut.of(tmp_path / "merged")
    assert len(try_out.trial("a" * 32, TASKS).merged.text) > 5
    with pytest.raises(ReadingError, match="has 33 tokens, and the model has room for 32"):
        try_out.trial("a" * 33, TASKS)


def test_images_that_cannot_be_read_are_refused(vit, tmp_path):
    try_out, path = TryOut.of(vit("average")), tmp_path / "broken.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(ReadingError, match="cannot be read: in no format that Pillow knows"):
        try_out.trial(path, TASKS)
    with pytest.raises(ReadingError, match="there is no image yet"):
        try_out.trial(None, TASKS)


def test_a_task_of_unknown_classes_says_how_to_name_them(tmp_path, base_folder, tuned_folders, picture):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    played_merges.write_processor(folder, 16)
    merger = Merger(folder, "mass", rank=2)
    merger.add("bare", tuned_folders[0])
    merger.save_pretrained(tmp_path / "merged")
    trial = TryOut.of(tmp_path / "merged").trial(picture, ["bare"])
    for answer in (trial.merged, trial.base, trial.experts["bare"]):
        assert "set_classes('bare'" in answer.reason
    assert "set_classes('bare'" in trial.routing.reason


def test_folders_that_nobody_can_try_are_refused(tmp_path, base_folder, tuned_folders, monkeypatch):
    Merger(base_folder, "average").save_pretrained(tmp_path / "empty")
    with pytest.raises(OptionError, match="empty: no task is merged"):
        TryOut.of(tmp_path / "empty")
    merger = Merger(base_folder, "average")
    merger.add("one", tuned_folders[0])
    merger.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no image processor"):
        TryOut.of(tmp_path / "bare")
    monkeypatch.setattr(type(merger.task), "modality", None)
    with pytest.raises(OptionError, match="task type 'clip': its samples are neither images nor texts"):
        TryOut.of(tmp_path / "bare")


def test_only_models_that_write_have_written_answers(base_model):
    assert TaskType.modality is None and Seq2SeqTask.modality == "text"
    with pytest.raises(ValueError, match="the answers of a clip model are not texts"):
        Merger(base_model, "average").task.written(base_model, None, 3)


def test_nothing_is_left_of_an_answer_that_failed(vit, picture, monkeypatch):
    try_out = TryOut.of(vit("routed"))
    before = try_out.trial(picture, TASKS)
    method = try_out.merger.method
    with monkeypatch.context() as patch:
        patch.setattr(method, "decision", lambda data: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            try_out.trial(picture, TASKS[:1])
    assert method.router.router.among is None
    assert try_out.trial(picture, TASKS) == before
    assert not any(layer._forward_pre_hooks for layer in method.layers.values())
