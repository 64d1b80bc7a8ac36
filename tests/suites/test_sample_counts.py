"""Samples are counted at the check, before any model is merged and without decoding an image."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from image_folders import image_folder, opened

import mingle
from mingle import suites
from mingle.cli import main
from mingle.suites import glyphs
from mingle.suites import image_folder as folders
from mingle.suites.protocol import Labels, SeedRequest, check_labels


@pytest.mark.parametrize(("samples", "enough"), [(3, True), (4, False), (5, False)])
def test_strict_seeds_must_leave_a_sample_for_the_test(tmp_path, monkeypatch, samples, enough):
    monkeypatch.setattr(folders, "read_image", lambda path: pytest.fail("an image was decoded"))
    suite = opened(image_folder(tmp_path / "images"), samples=samples)
    if enough:
        suite.check("letters")
    else:
        with pytest.raises(ValueError, match=rf"task 'letters': {3 * samples} seed samples .* of the 12 "):
            suite.check("letters")


def test_too_few_images_are_found_before_the_first_merge(tmp_path, capsys):
    image_folder(tmp_path / "images")
    experts = [{"name": "letters", "model": str(glyphs.DATA / "experts/greek-inverted")}]
    config = {"base": str(glyphs.BASE), "method": "average", "experts": experts}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config | {"eval": {"suite": str(tmp_path / "images")}}))
    for command in (["check"], ["merge", "--out", str(tmp_path / "out")]):
        assert main([command[0], str(tmp_path / "m.yaml"), *command[1:]]) == 2
        assert "15 seed samples are needed of the 12" in capsys.readouterr().out.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_official_seeds_name_classes_with_too_few_samples_once_with_their_counts(tmp_path, caplog):
    folder = image_folder(tmp_path / "images")
    (folder / "letters/beta/0.png").unlink()
    suite = opened(folder, protocol="official", samples=4)
    with caplog.at_level(logging.WARNING):
        suite.check("letters")
        suite.check("letters")
        assert len(suite.seeds("letters")) == 11
    assert [record.message for record in caplog.records] == [
        "task letters: fewer than 4 samples of a class: 'beta' has 3"
    ]


def test_official_seeds_name_a_class_without_samples():
    labels = Labels(torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    assert check_labels("t", labels, SeedRequest("official", 2)) == (
        "fewer than 2 samples of a class: 'c' has 0"
    )


@pytest.mark.parametrize("wrong", [[0, 3], [-1, 0]])
def test_labels_outside_the_classes_are_named(wrong):
    with pytest.raises(ValueError, match="there are 3 classes, from 0 on"):
        check_labels("t", Labels(torch.tensor(wrong), ["a", "b", "c"]), SeedRequest())


def test_glyphs_are_counted_without_rendering(monkeypatch):
    monkeypatch.setattr(glyphs, "_samples", lambda *_: pytest.fail("a picture was rendered"))
    suites.load("glyphs4", samples_per_class=24).check("greek-inverted")
    suites.load("glyphs4-corrupted", samples_per_class=174).check("greek-inverted")
    for name, samples in (("glyphs4", 25), ("glyphs4-corrupted", 175)):
        with pytest.raises(ValueError, match="none would be left for the test"):
            suites.load(name, samples_per_class=samples).check("greek-inverted")


def test_glyph_labels_are_counted_as_they_are():
    suite = suites.load("glyphs4-pixelate", protocol="official")
    counted = suite._labels["greek-inverted"]()
    assert torch.equal(counted.numbers.bincount(), suite["greek-inverted"].labels.bincount())


def test_images_of_the_papers_are_counted_without_decoding(image_hub):
    suites.load("clip-b32-8", samples_per_class=8).check("eurosat")
    with pytest.raises(ValueError, match="task 'eurosat': 27 seed samples are needed of the 25"):
        suites.load("clip-b32-8", samples_per_class=9).check("eurosat")


def test_fewer_than_no_seeds_are_refused():
    with pytest.raises(ValueError, match="samples_per_class=-1"):
        suites.load("glyphs4", samples_per_class=-1)


def test_no_seeds_are_refused_by_a_method_that_adapts_on_them(tmp_path, capsys):
    experts = [{"name": "greek-inverted", "model": str(glyphs.DATA / "experts/greek-inverted")}]
    config = {"base": str(glyphs.BASE), "experts": experts, "eval": {"suite": "glyphs4"}}
    for method, code in (("average", 0), ("mingle", 2)):
        given = config | {"method": method, "adapt": {"samples_per_class": 0}}
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(given))
        assert main(["check", str(tmp_path / "m.yaml")]) == code
    assert "samples_per_class is 0, and method 'mingle' needs seed samples" in capsys.readouterr().out


def test_classes_with_too_few_samples_are_recorded_with_the_merged_task(tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "letters/beta/0.png").unlink()
    experts = [{"name": "letters", "model": str(glyphs.DATA / "experts/greek-inverted")}]
    config = {"base": str(glyphs.BASE), "method": "mingle", "experts": experts, "rank": 2}
    config |= {"adapt": {"steps": 0, "samples_per_class": 4, "protocol": "official"}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config | {"eval": {"suite": str(folder)}}))
    assert main(["merge", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "out")]) == 0
    (task,) = mingle.Merger.from_pretrained(tmp_path / "out").merged
    assert task.seed_samples == 11
    assert "fewer than 4 samples of a class: 'beta' has 3" in task.notes
