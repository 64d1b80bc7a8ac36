"""The embedded suite: what ships is whole, the pictures are the same every time, and protocols keep their promises."""

from __future__ import annotations

import collections
import json

import pytest
import torch

from mingle import suites
from mingle.evaluate import accuracy
from mingle.files import sha256
from mingle.options import OptionError
from mingle.suites import glyphs
from mingle.suites.glyphs.alphabets import ALPHABETS, class_name
from mingle.suites.glyphs.corruptions import CORRUPTIONS, corrupt
from mingle.suites.glyphs.domains import DOMAINS
from mingle.suites.glyphs.finetune import FinetuneConfig, finetune
from mingle.suites.glyphs.render import TEST_FACES, TRAIN_FACES, faces_with
from mingle.suites.glyphs.tasks import SUITES, TUNING_TASKS, GlyphTask
from mingle.tasks.clip import ClipTask


def test_what_ships_is_what_the_manifest_says():
    manifest = json.loads((glyphs.DATA / "manifest.json").read_text())
    found = {str(p.relative_to(glyphs.DATA)): sha256(p) for p in glyphs.DATA.rglob("*") if p.is_file() and p.name != "manifest.json"}
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
    assert {name: len(tasks) for name, tasks in SUITES.items()} == {"glyphs4": 4, "glyphs8": 8, "glyphs20": 20, "glyphs8-shared": 8}
    for tasks in SUITES.values():
        counts = collections.Counter(task.domain for task in tasks)
        assert sum(counts[task.domain] > 1 for task in tasks) >= len(tasks) / 2
        assert {task.domain for task in tasks} <= set(DOMAINS) - {"plain"}
    assert len({task.domain for task in SUITES["glyphs8-shared"]}) == 1
    used = {task.alphabet for tasks in SUITES.values() for task in tasks}
    assert not used & {task.alphabet for task in TUNING_TASKS}


@pytest.mark.parametrize("task", [GlyphTask("greek", domain) for domain in DOMAINS], ids=lambda task: task.domain)
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
        base.vision_model.load_state_dict({k.removeprefix("vision_model."): v.float() for k, v in state.items()})
        tuned.append(accuracy(clip, base, suite[name]))
    assert 25 <= sum(zero_shot) / 8 <= 65
    assert sum(tuned) / 8 >= 90


def rows(data):
    return [x.numpy().tobytes() for x in data.inputs["pixel_values"]]


def test_strict_seeds_are_label_free_and_kept_out_of_the_test_set():
    suite = suites.load("glyphs8", protocol="strict", samples_per_class=2)
    seeds, test = suite.seeds("greek-inverted"), suite["greek-inverted"]
    assert (len(seeds), len(test)) == (40, 460)
    assert seeds.labels is None
    assert not set(rows(seeds)) & set(rows(test))
    other = suites.load("glyphs8", protocol="strict", samples_per_class=2, seed=1)
    assert rows(other.seeds("greek-inverted")) != rows(seeds)


def test_official_seeds_are_balanced_and_stay_in_the_test_set():
    suite = suites.load("glyphs8", protocol="official", samples_per_class=2)
    seeds, test = suite.seeds("greek-inverted"), suite["greek-inverted"]
    assert (len(seeds), len(test)) == (40, 500)
    assert set(rows(seeds)) <= set(rows(test))
    labels = dict(zip(rows(test), test.labels.tolist(), strict=True))
    assert collections.Counter(labels[row] for row in rows(seeds)) == dict.fromkeys(range(20), 2)


def test_corrupted_suites():
    whole, single = suites.load("glyphs4-corrupted"), suites.load("glyphs4-pixelate")
    assert list(whole) == list(single) == [task.name for task in SUITES["glyphs4"]]
    assert len(whole["greek-inverted"]) == 7 * 500 - 100
    assert len(single["greek-inverted"]) == 400


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
