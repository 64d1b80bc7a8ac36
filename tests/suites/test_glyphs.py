"""The embedded suite: what ships is whole, the pictures are the same every time, and protocols keep their
promises.
"""

from __future__ import annotations

import collections
import json
from functools import cache

import pytest
import torch
from few_samples import PER_CLASS

from mingle import suites
from mingle.io.files import sha256
from mingle.io.safetensors import CheckpointReader
from mingle.merging.evaluate import accuracy
from mingle.options import OptionError
from mingle.runs.compare import Comparison, run
from mingle.suites import glyphs
from mingle.suites.glyphs.alphabets import ALPHABETS, class_name
from mingle.suites.glyphs.corruptions import CORRUPTIONS, corrupt
from mingle.suites.glyphs.domains import DOMAINS
from mingle.suites.glyphs.finetune import FinetuneConfig, finetune
from mingle.suites.glyphs.render import TEST_FACES, TRAIN_FACES, faces_with
from mingle.suites.glyphs.tasks import SUITES, TUNING_TASKS, GlyphTask
from mingle.suites.protocol import SeedRequest
from mingle.tasks.clip import ClipTask


def test_what_ships_is_what_the_manifest_says():
    manifest = json.loads((glyphs.DATA / "manifest.json").read_text())
    found = {
        str(p.relative_to(glyphs.DATA)): sha256(p)
        for p in glyphs.DATA.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert found == manifest["files"]
    assert sum(p.stat().st_size for p in glyphs.DATA.rglob("*") if p.is_file()) <= 16_000_000
    assert {p.name for p in (glyphs.DATA / "experts").iterdir()} == {task.name for task in SUITES["glyphs8"]}


def test_alphabets():
    for name, characters in ALPHABETS.items():
        assert len(set(characters)) == len(characters)
        assert len({class_name(c) for c in characters}) == len(characters), name
        for c in characters:
            assert faces_with(c, TRAIN_FACES), (name, c)
            assert faces_with(c, TEST_FACES), (name, c)
    assert not set(TRAIN_FACES) & set(TEST_FACES)


def test_in_every_suite_half_of_the_tasks_share_their_domain():
    assert {name: len(tasks) for name, tasks in SUITES.items()} == {
        "glyphs4": 4,
        "glyphs8": 8,
        "glyphs20": 20,
        "glyphs8-shared": 8,
    }
    for tasks in SUITES.values():
        counts = collections.Counter(task.domain for task in tasks)
        assert sum(counts[task.domain] > 1 for task in tasks) >= len(tasks) / 2
        assert {task.domain for task in tasks} <= set(DOMAINS) - {"plain"}
    assert len({task.domain for task in SUITES["glyphs8-shared"]}) == 1
    used = {task.alphabet for tasks in SUITES.values() for task in tasks}
    assert not used & {task.alphabet for task in TUNING_TASKS}


@pytest.mark.parametrize(
    "task", [GlyphTask("greek", domain) for domain in DOMAINS], ids=lambda task: task.domain
)
def test_pictures_are_reproducible_and_not_blank(task):
    pictures, labels = task.test_set(3)
    assert pictures.shape == (3 * len(task.characters), 3, 28, 28)
    assert pictures.dtype == torch.uint8
    assert torch.equal(torch.bincount(labels), torch.full((len(task.characters),), 3))
    assert torch.equal(pictures, task.test_set(3)[0])
    assert pictures.float().std((1, 2, 3)).min() > 5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name):
    pictures, _ = GlyphTask("greek", "plain").test_set(1)
    damaged = corrupt(name, pictures)
    assert damaged.shape == pictures.shape
    assert damaged.dtype == torch.uint8
    assert torch.equal(damaged, corrupt(name, pictures))
    assert 2 < (damaged.float() - pictures.float()).abs().mean() < 100


@pytest.mark.slow
def test_quality_without_which_the_suite_proves_nothing():
    """Base poor but not blind, experts good, on the two tasks quickest to check; bench/results has all."""
    suite = suites.load("glyphs8")
    clip = ClipTask()
    base = clip.load(suite.base)
    zero_shot, tuned = [], []
    from safetensors.torch import load_file

    for name in suite:
        zero_shot.append(accuracy(clip, base, suite[name]))
    for name in suite:
        state = load_file(suite.expert(name) / "model.safetensors")
        base.vision_model.load_state_dict(
            {k.removeprefix("vision_model."): v.float() for k, v in state.items()}
        )
        tuned.append(accuracy(clip, base, suite[name]))
    assert 25 <= sum(zero_shot) / 8 <= 65
    assert sum(tuned) / 8 >= 90


def rows(data):
    return [x.numpy().tobytes() for x in data.inputs["pixel_values"]]


def test_strict_seeds_are_label_free_and_kept_out_of_the_test_set(few_images):
    suite = suites.load("glyphs8", protocol="strict", samples_per_class=2)
    seeds, test = suite.seeds("greek-inverted"), suite["greek-inverted"]
    assert (len(seeds), len(test)) == (20 * 2, 20 * (PER_CLASS - 2))
    assert seeds.labels is None
    assert not set(rows(seeds)) & set(rows(test))
    other = suites.load("glyphs8", protocol="strict", samples_per_class=2, seed=1)
    assert rows(other.seeds("greek-inverted")) != rows(seeds)


def test_official_seeds_are_balanced_and_stay_in_the_test_set(few_images):
    suite = suites.load("glyphs8", protocol="official", samples_per_class=2)
    seeds, test = suite.seeds("greek-inverted"), suite["greek-inverted"]
    assert (len(seeds), len(test)) == (20 * 2, 20 * PER_CLASS)
    assert set(rows(seeds)) <= set(rows(test))
    labels = dict(zip(rows(test), test.labels.tolist(), strict=True))
    assert collections.Counter(labels[row] for row in rows(seeds)) == dict.fromkeys(range(20), 2)


def test_corrupted_suites(few_images):
    whole, single = suites.load("glyphs4-corrupted"), suites.load("glyphs4-pixelate")
    assert list(whole) == list(single) == [task.name for task in SUITES["glyphs4"]]
    assert len(whole["greek-inverted"]) == 7 * 20 * PER_CLASS - 100
    assert len(single["greek-inverted"]) == 20 * PER_CLASS - 100


def test_unknown_names_are_refused():
    with pytest.raises(OptionError, match="unknown suite 'glyph8'; did you mean 'glyphs8'"):
        suites.load("glyph8")
    with pytest.raises(OptionError, match="did you mean 'official'"):
        suites.load("glyphs8", protocol="offical")
    with pytest.raises(KeyError, match="did you mean 'greek-inverted'"):
        suites.load("glyphs8")["greek-invert"]


def test_missing_experts_are_trained_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    task, steps = GlyphTask("digits", "inverted"), []
    monkeypatch.setattr(glyphs.finetune, "FinetuneConfig", lambda: FinetuneConfig(steps=3, batch_size=8))
    folder = glyphs.expert_folder(task, lambda name, step, total: steps.append((name, step, total)))
    assert steps == [("digits-inverted", i, 3) for i in (1, 2, 3)]
    assert folder.is_relative_to(tmp_path)
    assert glyphs.expert_folder(task, lambda *_: pytest.fail("trained twice")) == folder
    assert [p.name for p in folder.parent.iterdir()] == ["digits-inverted"]


def test_chains_of_models_are_trained_once_and_kept_by_order(tmp_path, monkeypatch):
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs.finetune, "FinetuneConfig", lambda: FinetuneConfig(steps=1, batch_size=4))
    trained = []
    suite = suites.load("glyphs8", on_training=lambda name, step, total: trained.append(name))
    names = list(suite)[:3]
    chain = suite.expert(names[2], names[:2])
    assert trained == names[1:]  # the first one ships
    assert suite.expert(names[2], names[:2]) == chain
    assert (
        suite.expert(names[1], names[:1]).parent == chain.parent
        and suite.expert(names[0]).parent != chain.parent
    )
    assert trained == names[1:]
    state = {
        key: CheckpointReader(folder).state_dict()
        for key, folder in (
            ("chain", chain),
            ("start", suite.expert(names[1], names[:1])),
            ("alone", suite.expert(names[2])),
        )
    }
    distance = {
        key: sum(
            (t.float() - state["chain"][name].float()).square().sum() for name, t in state[key].items()
        ).sqrt()
        for key in state
    }
    assert 0 < distance["start"] < distance["alone"] / 2  # one step away from where it started
    others = suite.expert(names[2], names[:1]), suite.expert(names[2], names[1::-1])
    assert len({chain, *others}) == 3
    assert sorted(path.name.split("-after-")[0] for path in chain.parent.iterdir()) == sorted(trained)


def test_two_processes_may_train_the_same_tower(tmp_path, monkeypatch):
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs.finetune, "FinetuneConfig", lambda: FinetuneConfig(steps=1, batch_size=4))
    task, others = GlyphTask("digits", "inverted"), []

    def meanwhile(*_):
        if not others:
            others.append(None)
            others[0] = glyphs.expert_folder(task)  # the other process begins later and is done first

    assert glyphs.expert_folder(task, meanwhile) == others[0]
    assert [path.name for path in others[0].parent.iterdir()] == ["digits-inverted"]


def test_training_samples_are_not_test_samples(few_images, monkeypatch):
    monkeypatch.setattr(glyphs, "TRAINING_IMAGES_PER_CLASS", 4)
    monkeypatch.setattr(glyphs, "_training", cache(glyphs._training.__wrapped__))
    suite = suites.load("glyphs8", protocol="official")
    whole = suite.seeds("greek-inverted", whole=True)
    assert whole.labels is None and len(whole) == 20 * 4
    assert not set(rows(whole)) & set(rows(suite["greek-inverted"]))
    suite.check_sequential()
    glyphs._training.cache_clear()
    assert rows(suites.load("glyphs8").seeds("greek-inverted", whole=True)) == rows(whole)


def test_suites_without_chains_or_training_samples_say_so(monkeypatch, tmp_path):
    plain = suites.Suite(
        "plain", "clip", glyphs.BASE, {"one": list}, {"one": lambda: glyphs.BASE}, SeedRequest()
    )
    assert plain.expert("one") == glyphs.BASE
    with pytest.raises(OptionError, match="suite 'plain': its fine-tuned models all start from the base"):
        plain.expert("one", ("two",))
    with pytest.raises(
        OptionError,
        match="suite 'plain': sequential methods adapt on all training samples, and it has none of 'one'",
    ):
        plain.seeds("one", whole=True)
    monkeypatch.setattr(suites, "load", lambda *_, **__: plain)
    with pytest.raises(OptionError, match="all start from the base"):
        run(Comparison("plain", methods=("average", "mingle-seq")), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_finetuning_is_reproducible_and_writes_a_hub_folder(tmp_path):
    from transformers import CLIPVisionModel

    task, config = GlyphTask("digits", "inverted"), FinetuneConfig(steps=2, batch_size=8)
    for name in ("a", "b"):
        finetune(glyphs.BASE, task, tmp_path / name, config)
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
    model, report = CLIPVisionModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.hidden_size == 128
