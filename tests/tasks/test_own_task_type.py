"""Task types of the user's own: objects, registered ones and those of packages, for models of any kind."""

from __future__ import annotations

import sys

import pytest
import torch
from few_methods import each_method
from plain_nets import Curves, PlainNet, curves, moved

import mingle
from mingle import tasks
from mingle.io.files import CheckpointError
from mingle.methods import METHODS
from mingle.tasks import TaskType

CHEAP = dict(rank=2, later_rank=2, steps=2, lr=1e-2, batch_size=4, r_p=4, r_v=2, r_l=2, depths=(0, 1), k=1)


class UnseenCurves(Curves):
    """Of which nobody knows how to run a model: its structure is judged by the order of layers."""

    name = "unseen-curves"
    run = TaskType.run


class CurvesWithHeads(Curves):
    name = "curves-with-heads"

    def heads(self, model):
        return ("classify.weight", "classify.bias")


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(tasks, "_registered", {})


@pytest.fixture
def base():
    return PlainNet().eval()


@pytest.mark.parametrize("task", [Curves(), UnseenCurves()], ids=lambda task: task.name)
def test_the_structure_of_a_plain_model_is_found(base, task):
    sets = task.structure(base).sets
    assert sets["full"] == ("attention.qkv", "attention.out", "up", "down")
    assert sets["attention"] == ("attention.qkv", "attention.out") and sets["mlp"] == ("up", "down")
    assert sets["light"] == ("attention.qkv", "up")


@pytest.mark.parametrize("task", [Curves(), UnseenCurves(), CurvesWithHeads()], ids=lambda task: task.name)
@each_method(METHODS)
def test_every_method_merges_a_plain_model_and_goes_on_after_loading(base, task, method, tmp_path):
    known = {name: CHEAP[name] for name in CHEAP if name in METHODS[method].Options.__dataclass_fields__}
    merger = mingle.Merger(base, method, task, **known)
    for name in ("one", "two"):
        merger.add(name, moved(base), curves())
    merger.save_pretrained(tmp_path / "merged", include_base=False)
    again = mingle.Merger.from_pretrained(tmp_path / "merged", base, task_type=task)
    x = curves()["curve"]
    for name in ("one", "two"):
        assert torch.equal(again.model_for(name)(x), merger.model_for(name)(x))
    again.add("three", moved(base), curves())
    result = again.evaluate({name: curves(labelled=True) for name in again.task_names})
    assert 0 <= result.acc <= 100


class NoTokens(torch.nn.Module):
    """Points [n, 8] → two scores [n, 2]; blocks are called with arguments by name."""

    def __init__(self):
        super().__init__()
        layers = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(2))
        self.layers, self.classify = torch.nn.ModuleList(layers), torch.nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x)
        return self.classify(x)


@pytest.mark.parametrize("method", ["mingle", "routed", "wemoe", "nufilt"])
def test_a_model_without_tokens_merges(method):
    points = type("Points", (TaskType,), {"logits": lambda self, model, data: model(data.inputs["point"])})
    base = NoTokens().eval()
    known = {name: CHEAP[name] for name in CHEAP if name in METHODS[method].Options.__dataclass_fields__}
    merger = mingle.Merger(base, method, points(), **known)
    for name in ("one", "two"):
        merger.add(name, moved(base), {"point": torch.randn(6, 8)})
    assert merger.model(torch.randn(3, 8)).shape == (3, 2)


def test_what_a_plain_model_lacks_is_asked_for(base, tmp_path):
    with pytest.raises(ValueError, match="PlainNet is not a model of transformers: give a task_type"):
        mingle.Merger(base, "average")
    merger = mingle.Merger(base, "average", Curves())
    merger.add("one", moved(base))
    with pytest.raises(
        CheckpointError, match="PlainNet has no config to save it with; use include_base=False"
    ):
        merger.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="PlainNet has no config, without which a hub folder"):
        merger.export(tmp_path / "exported")
    merger.save_pretrained(tmp_path / "merged", include_base=False)
    with pytest.raises(CheckpointError, match="saved without its base model; give it as base="):
        mingle.Merger.from_pretrained(tmp_path / "merged", task_type=Curves())
    with pytest.raises(CheckpointError, match="task type 'curves'.*one of your own: give it as an object"):
        mingle.Merger.from_pretrained(tmp_path / "merged", base)
    with pytest.raises(CheckpointError, match="task type 'curves', and 'unseen-curves' was given"):
        mingle.Merger.from_pretrained(tmp_path / "merged", base, task_type=UnseenCurves())


def test_a_registered_task_type_goes_by_its_name(base, tmp_path):
    tasks.register(Curves)
    merger = mingle.Merger(base, "average", "curves")
    merger.add("one", moved(base))
    merger.save_pretrained(tmp_path / "merged", include_base=False)
    assert isinstance(mingle.Merger.from_pretrained(tmp_path / "merged", base).task, Curves)
    with pytest.raises(TypeError, match="expected a mingle.tasks.TaskType"):
        tasks.register(object())
    clip = type("Mine", (Curves,), {"name": "clip"})
    with pytest.raises(ValueError, match="'clip': mingle has one of that name"):
        tasks.register(clip)


def test_a_class_without_a_name_is_called_as_itself():
    assert type("Mine", (TaskType,), {"logits": lambda self, model, data: None})().name == "Mine"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with an entry point for each of its task types; two of them are broken."""
    points = "[mingle.task_types]\n"
    points += "offered = offered:Offered\nmisnamed = offered:Offered\nmissing = offered:Nothing\n"
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "offered.py").write_text(
        "from mingle.tasks import TaskType\n"
        "class Offered(TaskType):\n"
        "    name = 'offered'\n"
        "    def logits(self, model, data):\n"
        "        return model(data.inputs['curve'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("offered", None)


def test_packages_offer_task_types_by_entry_points(package, base):
    merger = mingle.Merger(base, "average", "offered")
    merger.add("one", moved(base))
    assert merger.evaluate({"one": curves(labelled=True)}).acc >= 0
    with pytest.raises(ValueError, match="entry point 'missing' of offered: .*Nothing"):
        tasks.get("missing")
    with pytest.raises(ValueError, match="expected one of clip, .*offered"):
        tasks.get("nobody")


def test_an_entry_point_has_the_name_of_its_task_type(package):
    with pytest.raises(
        ValueError, match="entry point 'misnamed' of offered: offered:Offered has another name"
    ):
        tasks.get("misnamed")


def test_samples_of_any_names_are_checked(base):
    task = Curves()
    with pytest.raises(ValueError, match="expected one row per sample in each"):
        task.data({"curve": torch.zeros(3, 5, 3), "labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="curve: 'wave': expected a tensor"):
        task.data({"curve": "wave"})
    with pytest.raises(ValueError, match="samples with labels: expected inputs"):
        task.data({"labels": torch.zeros(2)})
