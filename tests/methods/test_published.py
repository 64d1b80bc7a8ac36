"""The published settings, and what wins over them."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from mingle.io.merger_folder import load
from mingle.methods import METHODS, get, published
from mingle.methods.published import _settings
from mingle.options import build
from mingle.runs import config
from mingle.runs.check import check
from mingle.runs.settings import for_suite, known


@pytest.mark.parametrize("task_type", ["clip", "seq2seq"])
@pytest.mark.parametrize("method", METHODS)
def test_every_published_setting_is_an_option_the_method_takes(method, task_type):
    settings = published(method, task_type, 8)
    assert settings == _settings(method, task_type, 8)  # nothing was left out for want of an option
    build(get(method).Options, settings, method)


def test_the_figures():
    for method in ("task-arithmetic", "ties"):
        assert [published(method, "clip", tasks)["scaling"] for tasks in (4, 8, 11, 14, 20)] == [
            0.3,
            0.3,
            0.1,
            0.1,
            0.1,
        ]
    assert published("magmax", "clip", 8) == {"scaling": 0.5}
    vision, text = (published("mingle", task_type, 8) for task_type in ("clip", "seq2seq"))
    assert (vision["lr"], vision["batch_size"], vision["steps"], vision["rank"]) == (1e-4, 16, 50, 64)
    assert (text["lr"], text["batch_size"], text["steps"], text["rank"]) == (1e-3, 8, 50, 64)
    assert published("mingle-seq", "clip", 11)["steps"] == 500
    assert published("mingle-seq", "clip", 11)["constraint"] == "hard"


def test_defaults_are_the_published_settings_for_eight_vision_tasks():
    for method in METHODS:
        defaults = {field.name: field.default for field in fields(get(method).Options)}
        assert published(method, "clip", 8).items() <= defaults.items(), method


def test_what_is_not_known_has_no_published_settings():
    assert published("individual", "clip", 8) == {}
    assert published("no-such-method", "clip", 8) == {}
    assert published("mingle", "no-such-type", 8) == {}


class Suite(dict):
    name, task_type = "stub", "seq2seq"
    request = SimpleNamespace(protocol="official")

    @property
    def settings(self):
        return {"mingle": {"rank": 32, "lr": 4e-3}}


def test_a_suite_and_then_explicit_options_win_over_published_settings():
    suite = Suite.fromkeys(f"task{i}" for i in range(9))
    options = for_suite("mingle", suite, known("mingle", {"rank": 16, "scaling": 0.7}))
    assert (options["rank"], options["lr"], options["batch_size"], options["reduce"]) == (
        16,
        4e-3,
        8,
        "batch",
    )
    assert "scaling" not in options
    assert (
        for_suite("wemoe", suite, {}).items()
        >= {"rank": 32, "later_rank": 32, "lr": 1e-3, "steps": 100}.items()
    )
    assert for_suite("nufilt", suite, {})["lr"] == 1e-3  # the suite's is that of another loss
    assert for_suite("ties", suite, {})["scaling"] == 0.1
    assert for_suite("ties", suite, {"scaling": 0.7})["scaling"] == 0.7


@pytest.mark.parametrize(
    ("tasks", "options", "scaling"), [(3, {}, 0.3), (9, {}, 0.1), (9, {"scaling": 0.7}, 0.7)]
)
def test_a_config_takes_the_published_settings_for_its_tasks(
    base_folder, tuned_folders, tmp_path, tasks, options, scaling
):
    experts = [{"name": f"task{i}", "model": str(tuned_folders[i % 3])} for i in range(tasks)]
    content = {"base": str(base_folder), "experts": experts, "method": "task-arithmetic", "options": options}
    out = tmp_path / "merged"
    for _ in range(2):  # the second time everything is there already
        list(check(config.parse(content, "test"), out).run())
        assert load(out).manifest["options"] == {"scaling": scaling}
