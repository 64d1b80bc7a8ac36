"""Merged models of texts asked for single answers: classes, likeness, and texts."""

from __future__ import annotations

import math

import played_merges
import pytest
from played_merges import CLASSES, TASKS
from trial_answers import first

from mingle.merging.merger import Merger
from mingle.runs.play import try_out as try_out_module
from mingle.runs.play.try_out import TryOut
from mingle.tasks import TaskType
from mingle.tasks.readers import ReadingError
from mingle.tasks.seq2seq import Seq2SeqTask


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


def test_only_models_that_write_have_written_answers(base_model):
    assert TaskType.modality is None and Seq2SeqTask.modality == "text"
    with pytest.raises(ValueError, match="the answers of a clip model are not texts"):
        Merger(base_model, "average").task.written(base_model, None, 3)
