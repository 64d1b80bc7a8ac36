"""``mingle export`` takes the samples that it needs from the merge's suite, and nothing that it does not."""

from __future__ import annotations

import json

import pytest
from small_merges import SETTINGS
from stub_tables import NAMES
from transformers import CLIPModel

import mingle
from mingle.cli import main
from mingle.runs.origin import origin
from mingle.tasks import TaskData


@pytest.fixture
def export(stub, base_folder, tuned_folders, samples, tmp_path, capsys):
    """Merges two tasks, exports with the options given, and returns code, output, and the folder."""

    def run(method, suite, *arguments):
        merger = mingle.Merger(base_folder, method, **SETTINGS)
        merger.metadata = origin(suite)
        for i, name in enumerate(NAMES[:2]):
            merger.add(name, tuned_folders[i], TaskData(samples[i].inputs, samples[i].shared))
        merger.save_pretrained(tmp_path / "merged")
        code = main(["export", str(tmp_path / "merged"), "--out", str(tmp_path / "out"), *arguments])
        return code, capsys.readouterr().out, tmp_path / "out"

    return run


@pytest.mark.parametrize(
    ("suite", "arguments", "gates"),
    [
        ("stub", [], "the means over 15 samples of the task"),
        ("stub", ["--samples-per-class", "1"], "the means over 5 samples of the task"),
        (None, [], "1 for the task's own expert and 0 for all others"),
        (None, ["--suite", "stub"], "the means over 15 samples of the task"),
    ],
)
def test_gates_of_a_folded_model_are_means_over_seed_samples(export, suite, arguments, gates):
    code, said, out = export("mingle", suite, "--task", NAMES[1], *arguments)
    assert code == 0 and "plain model: " in said
    assert gates in (out / "README.md").read_text()
    CLIPModel.from_pretrained(out)


def test_adapters_are_written_and_need_no_samples(export, base_folder):
    code, said, out = export("mingle", "no longer there", "--format", "peft")
    assert code == 0 and "adapters: " in said
    assert [task["name"] for task in json.loads((out / "router.json").read_text())["tasks"]] == ["one", "two"]
    assert mingle.Merger.from_adapters(base_folder, out).task_names == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "peft", "--task", NAMES[0]], "leave the task out"),
        (["--format", "peft", "--suite", "stub"], "--suite: samples are only for the model of one task"),
        (["--task", "nothing"], "'nothing' is not among the merged ones"),
        ([], "name a task to fold the experts"),
    ],
)
def test_what_makes_no_sense_is_refused(export, arguments, message):
    code, said, out = export("mingle", "stub", *arguments)
    assert code == 2 and message in " ".join(said.split())
    assert not out.exists()
