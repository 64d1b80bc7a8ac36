"""The plan that ``mingle check`` prints: what a merge would do, who chose it, and what it would take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from merge_files import merge_file
from stub_suite import NAMES

from mingle import suites
from mingle.cli import main
from mingle.merging import evaluate as evaluating
from mingle.merging import merger as merging
from mingle.runs import config, costs
from mingle.runs.check import check
from mingle.suites import Suite

ORDERS = {"shuffle": True, "seeds": [42, 43]}


@pytest.fixture
def write(tmp_path, base_folder, tuned_folders):
    def write(method: str, **more) -> Path:
        experts = dict(zip(NAMES, tuned_folders, strict=True))
        return merge_file(tmp_path, base_folder, experts, method, **more)

    return write


@pytest.fixture(autouse=True)
def _counted(stub, monkeypatch):
    """The suite counts its samples, as most suites do."""
    load = suites.load

    def loaded(*arguments, **options):
        suite = load(*arguments, **options)
        labels = {name: suite._samples[name]().labels for name in suite}
        suite._labels = {name: lambda name=name: suites.Labels(labels[name]) for name in suite}
        suite.settings["mingle"] = {"rank": 4}
        return suite

    monkeypatch.setattr(suites, "load", loaded)


def plan_of(capsys, path: Path, *more: str) -> str:
    capsys.readouterr()
    assert main(["check", str(path), *more]) == 0
    return capsys.readouterr().out


def test_it_shows_order_settings_and_costs_before_anything_is_computed(write, capsys, monkeypatch):
    def working(*arguments, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(merging.Merger, "__init__", working)
    monkeypatch.setattr(Suite, "_parts", working)
    monkeypatch.setenv("COLUMNS", "200")
    path = write("mingle", order=ORDERS, adapt={"steps": 7}, eval={"suite": "stub"})
    text = plan_of(capsys, path)
    first, second = check(config.load(path)).orders
    places = [text.index(f" {name} ") for name in first]
    assert places == sorted(places)
    assert f"then in the order: {', '.join(second)}\n" in text
    rows = {tuple(re.split(r"\s{2,}", line.strip())) for line in text.splitlines()}
    assert ("steps", "7", "yours") in rows
    assert ("rank", "4", "recommended by the suite stub") in rows
    assert ("temperature", "2.0", "published for clip, 3 tasks") in rows
    assert ("reduce", "sample", "protocol strict") in rows
    assert ("gate_init", "normal", "the method's own") in rows
    assert "measured: after every merge, on the suite stub, protocol strict, " in text
    assert re.search(r"disk: about .* kB: base ", text) and re.search(r"memory: about 60\d MB: base ", text)
    assert re.search(r"time: roughly \d:\d\d:\d\d: files .*, adapting .*, measuring ", text)


def test_its_document_is_the_plan_that_merge_follows(write, tmp_path, capsys):
    path = write("mingle", adapt={"steps": 2, "batch_size": 8}, eval={"suite": "stub"})
    found, plan = json.loads(plan_of(capsys, path, "--json")), check(config.load(path))
    assert {name: one["value"] for name, one in found["settings"].items()} == json.loads(
        json.dumps(dict(plan.options))
    )
    assert found["orders"] == [list(NAMES)] == plan.orders
    assert found["base"]["bytes"] == sum(f.stat().st_size for f in plan.base.glob("*.safetensors"))
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    taken = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert taken / 2 < sum(found["costs"]["disk"].values()) < 4 * taken


@pytest.mark.parametrize("every_step", [True, False])
def test_as_many_samples_are_announced_as_are_measured(every_step, write, tmp_path, monkeypatch):
    path = write("average", eval={"suite": "stub", "every_step": every_step})
    seen = []
    for name in ("accuracy", "accuracies"):
        real = getattr(evaluating, name)
        monkeypatch.setattr(
            merging, name, lambda *given, real=real: seen.append(len(given[-2])) or real(*given)
        )
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert costs.evaluations(check(config.load(path))) == sum(seen) > 0
    assert len(seen) == (6 if every_step else 3)


def test_what_is_not_known_is_said_to_be_unknown(write, capsys, monkeypatch):
    monkeypatch.setattr(Suite, "size", lambda self, name: None)
    path = write("average", eval={"suite": "stub"})
    assert "and an unknown time for measuring" in plan_of(capsys, path)
    found = json.loads(plan_of(capsys, path, "--json"))
    assert found["evaluation"]["samples"] is found["costs"]["seconds"]["measuring"] is None
    text = plan_of(capsys, write("average"))
    assert "measured: nothing, as no suite is named" in text and "unknown" not in text


def test_more_tasks_steps_and_orders_cost_more(write):
    def costs_of(**changes):
        content = yaml.safe_load(write("mingle", eval={"suite": "stub"}).read_text())
        return costs.of_plan(check(config.parse(content | changes, "here")))

    less = costs_of(adapt={"steps": 10}, rank=2)
    assert sum(costs_of(adapt={"steps": 10}, rank=4).disk.values()) > sum(less.disk.values())
    assert costs_of(adapt={"steps": 10}, rank=2, order=ORDERS).disk["tasks"] == 2 * less.disk["tasks"]
    assert costs_of(adapt={"steps": 1000}, rank=2).seconds["adapting"] > 10 * less.seconds["adapting"]
