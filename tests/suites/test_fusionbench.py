"""The image suites of the papers on a stand-in of the hub: images, heads, prompts, seeds and models."""

from __future__ import annotations

import io
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pyarrow", reason="the suites of the papers read Parquet files")

import standin_hub as standin
from PIL import Image
from standin_hub import BASE, EUROSAT, TEST_FILE, images, table
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from mingle import suites
from mingle.io.files import CheckpointError
from mingle.merging.evaluate import accuracy
from mingle.options import OptionError
from mingle.suites import clip_base
from mingle.suites.fusionbench import clip, prompts
from mingle.suites.fusionbench.datasets import CORRUPTIONS, IMAGE_SUITES, IMAGE_TASKS
from mingle.suites.fusionbench.layout import DatasetError
from mingle.tasks.clip import ClipTask
from mingle.tasks.lazy import LazyInputs


def test_orders_and_models_are_those_of_the_papers():
    names = [task.name for task in IMAGE_TASKS]
    for count in (8, 14, 20):
        for size in ("b32", "b16", "l14"):
            assert list(suites.load(f"clip-{size}-{count}")) == names[:count]
    domains = "aircraft caltech101 cifar100 dtd eurosat flowers food101 mnist pets cars sun397"
    assert list(suites.load("mtil-11")) == domains.split()
    assert (
        list(suites.load("glue-8"))
        == list(suites.load("glue-8-lora"))
        == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
    )
    assert IMAGE_SUITES["clip-l14-20"].base == "openai/clip-vit-large-patch14"
    for name in (
        "clip-b32-corrupted",
        "clip-b32-clean",
        *(f"clip-b32-{corruption}" for corruption in CORRUPTIONS),
    ):
        assert list(suites.load(name)) == ["stanford-cars", "eurosat", "resisc45", "gtsrb"]


@pytest.mark.parametrize(
    ("suite", "task", "model"),
    [
        ("clip-b32-8", "sun397", "tanganke/clip-vit-base-patch32_sun397"),
        ("clip-b16-14", "oxford-iiit-pet", "tanganke/clip-vit-base-patch16_oxford-iiit-pet"),
        ("clip-l14-20", "emnist_letters", "tanganke/clip-vit-large-patch14_emnist_letters"),
        ("mtil-11", "cars", "tanganke/clip-vit-base-patch16_stanford-cars"),
        ("glue-8", "stsb", "tanganke/flan-t5-base_glue-stsb"),
        ("glue-8-lora", "mnli", "tanganke/flan-t5-base_glue-mnli_lora-16"),
    ],
)
def test_fine_tuned_models_have_the_hub_s_names(hub, suite, task, model):
    with pytest.raises(CheckpointError, match=f"^{model}: not in the hub's cache.*hf download {model}"):
        suites.load(suite).expert(task)
    hub.add(model, {"adapter_model.safetensors": b"", "adapter_config.json": b"{}"})
    assert suites.load(suite).expert(task) == hub.snapshot(model)


def test_samples_are_the_images_through_the_base_s_own_processor(image_hub):
    data = suites.load("clip-b32-8", protocol="official")["eurosat"]
    assert isinstance(data.inputs, LazyInputs) and len(data) == 25
    assert data.labels.tolist() == [i % 3 for i in range(25)]
    processor = CLIPImageProcessorPil.from_pretrained(image_hub.snapshot(BASE))
    encoded = [row["bytes"] for row in images(25, 3)["image"]]
    expected = [
        processor(images=[Image.open(io.BytesIO(e)).convert("RGB")], return_tensors="pt")["pixel_values"]
        for e in encoded
    ]
    found = [batch.inputs["pixel_values"] for batch in data.batches(7)]
    assert [len(batch) for batch in found] == [7, 7, 7, 4]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_images_are_decoded_batch_by_batch(image_hub, monkeypatch):
    decoded: list[int] = []
    made = clip._Pixels.__call__
    monkeypatch.setattr(
        clip._Pixels, "__call__", lambda self, rows: decoded.append(len(rows)) or made(self, rows)
    )
    suite = suites.load("clip-b32-8", samples_per_class=1)
    data = ClipTask().data(suite["eurosat"])
    assert max(decoded) <= 3  # the seeds, and one image to see its shape
    model = CLIPModel.from_pretrained(image_hub.snapshot(BASE)).eval()
    decoded.clear()
    accuracy(ClipTask(), model, data, 10)
    assert decoded == [10, 10, 2]
    whole = data.made()
    assert not isinstance(whole.inputs, LazyInputs)
    assert accuracy(ClipTask(), model, whole, 10) == accuracy(ClipTask(), model, data, 10)


def test_the_head_is_the_mean_of_the_templates(image_hub):
    found = suites.load("clip-b32-8")["eurosat"].shared["text_embeds"]
    folder = image_hub.snapshot(BASE)
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    for number, name in enumerate(("annual crop land", "forest", "river")):
        texts = [f"a photo of {name}.", f"a {name}."]
        with torch.no_grad():
            embeddings = [
                model.text_projection(model.text_model(**tokenizer([t], return_tensors="pt")).pooler_output)
                for t in texts
            ]
        expected = F.normalize(torch.stack([F.normalize(e, dim=-1) for e in embeddings]).mean(0), dim=-1)[0]
        torch.testing.assert_close(found[number], expected)


def test_heads_are_kept_by_the_content_of_the_base(image_hub, monkeypatch, tmp_path):
    calls = []
    make = clip_base.zero_shot_head
    monkeypatch.setattr(clip_base, "zero_shot_head", lambda *given: calls.append(1) or make(*given))
    first = [suites.load("clip-b32-8")["eurosat"].shared["text_embeds"] for _ in range(2)]
    assert torch.equal(*first) and len(calls) == 1
    suites.load("clip-b32-8")["svhn"]
    assert len(calls) == 2
    image_hub.add(BASE, standin.clip_base(tmp_path / "models/other", standin.clip(1)))
    assert not torch.equal(first[0], suites.load("clip-b32-8")["eurosat"].shared["text_embeds"])
    assert len(calls) == 3


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_seeds_come_from_the_test_images_as_the_protocol_says(image_hub, protocol):
    suite = suites.load("clip-b32-8", protocol=protocol, samples_per_class=2)
    seeds, test = suite.seeds("eurosat"), suite["eurosat"]
    assert seeds.labels is None and seeds.inputs["pixel_values"].shape == (6, 3, 16, 16)
    rows = test.inputs.rows.tolist()
    pixels = suites.load("clip-b32-8", protocol="official")["eurosat"].made().inputs["pixel_values"]
    chosen = [
        next(i for i in range(25) if torch.equal(pixels[i], seed)) for seed in seeds.inputs["pixel_values"]
    ]
    if protocol == "strict":
        assert sorted(rows + chosen) == list(range(25))
    else:
        assert rows == list(range(25)) and sorted(i % 3 for i in chosen) == [0, 0, 1, 1, 2, 2]


def test_the_config_of_a_data_set_with_several_is_the_published_one(image_hub):
    assert len(suites.load("clip-b32-8", protocol="official")["svhn"]) == 20


def test_corrupted_images_are_splits_of_the_same_data_sets(image_hub):
    files = {
        f"data/{split}-00000-of-00001.parquet": table(images(i + 3, 3)) for i, split in enumerate(CORRUPTIONS)
    }
    image_hub.add(EUROSAT, files | {TEST_FILE: table(images(2, 2))}, "dataset")
    for i, split in enumerate(CORRUPTIONS):
        assert (
            len(suites.load(f"clip-b32-{split}", protocol="official", samples_per_class=1)["eurosat"])
            == i + 3
        )
    everything = suites.load("clip-b32-corrupted", protocol="official")["eurosat"]
    assert everything.labels.tolist() == [row % 3 for i in range(len(CORRUPTIONS)) for row in range(i + 3)]
    assert everything.select(torch.tensor([0, 41])).made().inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert len(suites.load("clip-b32-clean", protocol="official")["eurosat"]) == 2


@pytest.mark.parametrize(
    ("suite", "task", "repo", "file", "columns"),
    [
        (
            "clip-b32-14",
            "fer2013",
            "clip-benchmark/wds_fer2013",
            "default/test/0000.parquet",
            images(4, 2, "jpg", "cls"),
        ),
        (
            "clip-b32-14",
            "cifar100",
            "tanganke/cifar100",
            TEST_FILE,
            images(4, 2, label="fine_label") | {"coarse_label": [9] * 4},
        ),
        ("clip-b32-20", "food101", "ethz/food101", "data/validation-00000-of-00001.parquet", images(4, 2)),
    ],
)
def test_columns_and_splits_that_are_called_otherwise(image_hub, suite, task, repo, file, columns):
    image_hub.add(repo, {file: table(columns)}, "dataset")
    data = suites.load(suite, protocol="official")[task]
    assert data.labels.tolist() == [0, 1, 0, 1] and data.made().inputs["pixel_values"].shape == (4, 3, 16, 16)


def test_tasks_outside_the_package_take_the_class_names_of_the_data_set(image_hub, tmp_path):
    image_hub.add("openai/clip-vit-base-patch16", standin.clip_base(tmp_path / "models/b16", standin.clip()))
    image_hub.add(
        "tanganke/aircraft", {TEST_FILE: table(images(4, 2), {"label": ["707", "A380"]})}, "dataset"
    )
    data = suites.load("mtil-11", protocol="official")["aircraft"]
    assert data.shared["text_embeds"].shape == (2, 16)


def test_every_commit_that_was_used_is_noted_and_kept(image_hub):
    revisions: dict[str, str] = {}
    suite = suites.load("clip-b32-8", revisions=revisions)
    assert revisions == {}
    suite.check("eurosat")
    suite.expert("eurosat")
    repos = {
        BASE: "model",
        "tanganke/clip-vit-base-patch32_eurosat": "model",
        f"datasets/{EUROSAT}": "dataset",
    }
    assert revisions == {
        repo: image_hub.snapshot(repo.removeprefix("datasets/"), kind).name for repo, kind in repos.items()
    }
    before = len(suite["eurosat"])
    image_hub.add(EUROSAT, {TEST_FILE: table(images(90, 3))}, "dataset")
    assert len(suites.load("clip-b32-8", revisions=revisions)["eurosat"]) == before


def test_defects_are_found_before_models_are_loaded(image_hub, monkeypatch):
    monkeypatch.setattr(ClipTask, "load", lambda *_: pytest.fail("a model was loaded"))
    for columns, message in (
        ({"picture": images(3, 3)["image"], "label": [0, 1, 2]}, "no column 'image'.*it has picture, label"),
        (images(5, 5), "row 3 has label 3, but there are 3 classes"),
    ):
        image_hub.add(EUROSAT, {TEST_FILE: table(columns)}, "dataset")
        with pytest.raises(DatasetError, match=f"{EUROSAT}, split 'test': {message}"):
            suites.load("clip-b32-8").check("eurosat")


@pytest.mark.parametrize("broken", [b"not an image", b"", None, standin.picture(0)[:200]])
def test_an_image_that_cannot_be_decoded_is_named_with_file_and_row(image_hub, broken):
    columns = images(9, 3)
    columns["image"][6] = {"bytes": broken, "path": "6.png"}
    image_hub.add(EUROSAT, {TEST_FILE: table(columns)}, "dataset")
    with pytest.raises(
        DatasetError, match=rf"{EUROSAT}, split 'test': not a readable image: .*{TEST_FILE}, row 6"
    ):
        suites.load("clip-b32-8", protocol="official")["eurosat"].made()


def test_a_base_without_an_image_processor_is_refused_at_the_check(image_hub, tmp_path):
    files = standin.clip_base(tmp_path / "models/again", standin.clip())
    del files["preprocessor_config.json"]
    image_hub.add(BASE, files)
    with pytest.raises(CheckpointError, match="no image processor .preprocessor_config.json"):
        suites.load("clip-b32-8").check("eurosat")


def test_a_missing_package_is_named_with_the_extra(image_hub, monkeypatch):
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"fusion-bench: pip install 'mingle-merge\[suites\]'"):
        suites.load("clip-b32-8").check("eurosat")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match=r"Parquet files: pip install 'mingle-merge\[suites\]'"):
        suites.load("clip-b32-8").check("eurosat")
