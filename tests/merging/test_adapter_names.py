"""What a folder of exported adapters says: names that others can use, a card that is true and runs."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from adapter_merges import ROUTED, WHOLE, merger_of
from small_merges import NAMES

import mingle
from mingle.io.adapters_folder import folder_names
from mingle.tasks import TaskData


def test_nothing_of_the_machine_is_in_it(base_folder, tuned_states, samples, tmp_path):
    snapshot = tmp_path / "models--org--small-clip" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(base_folder, snapshot)
    merger = merger_of(snapshot, "routed", tuned_states, samples)
    merger.metadata["suite"] = str(tmp_path / "images")
    merger.save_pretrained(tmp_path / "merged")
    expected = {tmp_path / "a": merger, tmp_path / "b": mingle.Merger.from_pretrained(tmp_path / "merged")}
    for out, each in expected.items():
        each.export(out, format="peft")
        config = json.loads((out / "one" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/small-clip"
        assert config["revision"] == snapshot.name
        assert not [
            file for file in out.rglob("*") if file.is_file() and str(tmp_path).encode() in file.read_bytes()
        ]
        assert "base_model: org/small-clip" in (out / "README.md").read_text()


@pytest.mark.parametrize("place", ["/home/someone/models/clip", "C:\\models\\clip", "./clip", None])
def test_a_module_s_own_name_is_cut_to_what_others_can_use(
    base_model, tuned_states, samples, tmp_path, place
):
    base = copy.deepcopy(base_model)
    base.config._name_or_path = place or ""
    merger_of(base, "routed", tuned_states, samples).export(tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ("clip" if place else None)


def test_the_card_says_how_well_one_adapter_per_input_does(base_model, tuned_states, samples, tmp_path):
    merger = merger_of(base_model, "routed", tuned_states, samples, gates="hard")
    merger.export(tmp_path / "a", format="peft")
    assert "whose accuracy was not measured" in (tmp_path / "a" / "README.md").read_text()
    acc = merger.evaluate(dict(zip(NAMES, samples, strict=False))).matrix[-1][0]
    merger.export(tmp_path / "b", format="peft")
    card = (tmp_path / "b" / "README.md").read_text()
    assert 'has the accuracies above, under "now"' in card and f"| not measured | {acc:.1f} % |" in card
    soft = merger_of(base_model, "routed", tuned_states, samples)
    soft.export(tmp_path / "c", format="peft")
    assert "the accuracy of that was not measured" in (tmp_path / "c" / "README.md").read_text()


def test_the_card_s_code_runs(base_folder, tuned_states, samples, tmp_path, monkeypatch):
    merger_of(base_folder, "routed", tuned_states, samples).export(tmp_path / "out", format="peft")
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    shutil.copytree(base_folder, tmp_path / "out" / "base")  # the base's folder has this name
    monkeypatch.chdir(tmp_path / "out")
    names = {}
    exec(code, names)
    assert names["model"].active_adapter == "two"


def test_task_names_become_folders_that_are_safe_and_differ():
    hostile = [
        "../x",
        "a/b",
        "a b",
        "A_B",
        "",
        "日本",
        "v1.5",
        "train",
        "x" * 300,
        "-rf",
        "router.json",
        "\x1b[2J",
    ]
    names = folder_names(hostile)
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert name.replace("-", "").replace("_", "").isalnum() and name.isascii() and name[0] not in "-_"
        torch.nn.ModuleDict()[name] = torch.nn.Identity()  # as PEFT does
    assert names[6] == "v1_5"


def test_hostile_task_names_come_back(base_model, tuned_states, samples, tmp_path):
    names = ["../../x", "a|b`\n# c"]
    merger = mingle.Merger(base_model, "routed", **ROUTED)
    for i, name in enumerate(names):
        merger.add(name, tuned_states[i], TaskData(samples[i].inputs, samples[i].shared))
    merger.export(tmp_path / "place" / "out", format="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert {path.name for path in (tmp_path / "place" / "out").iterdir()} == WHOLE | {"x", "a_b_c"}
    assert mingle.Merger.from_adapters(base_model, tmp_path / "place" / "out").task_names == names
